// What a reader may type to name a neuron.

/**
 * The neuron that `text` names, if it names one: "12/345" by the site's number, "layers.2/345"
 * or "layers.2 345" by its name, or "345" where the run has one site.
 * @returns {{site: number, neuron: number} | null}
 */
export function directNeuron(run, text) {
  const match = text.trim().match(/^(?:(.+?)\s*[/\s:#]\s*)?(\d+)$/);
  if (!match) return null;
  const [, place, digits] = match;
  let site;
  if (place === undefined) site = run.sites.length === 1 ? run.sites[0] : undefined;
  else site = run.sites.find((s) => s.name === place) ?? run.sites.find((s) => String(s.number) === place);
  const neuron = Number(digits);
  return site && neuron < site.n_neurons ? { site: site.number, neuron } : null;
}

/** How a site is called: its name, and its number too where there are several. */
export function siteName(run, site) {
  return run.sites.length === 1 ? site.name : `${site.number} · ${site.name}`;
}
