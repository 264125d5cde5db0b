// Names of neurons and sites, and what a reader may type for them. A site's address is the layer number in its name,
// if no other site of the run has the same number, or else its name: 12/345, or lm_head/345.

import { isolated, whole } from "./format.js";

const LISTED = 6; // names of sites in a sentence

/** The site that `place` names: by its name, or by its layer number if only one site has it. */
export function siteOf(run, place) {
  const byName = run.sites.find(({ name }) => name === place);
  if (byName || !/^\d+$/.test(place)) return byName;
  return run.sites.find(({ address }) => address === String(Number(place)));
}

/** A sentence that says why `place` names no site of the run. */
export function noSite(run, place) {
  const names = (sites) => `${sites.slice(0, LISTED).map(({ name }) => isolated(name)).join(", ")}${sites.length > LISTED ? ` … (${whole(sites.length)} in all)` : ""}`;
  if (!/^\d+$/.test(place)) return `There is no site “${isolated(place)}” in this run; it has ${names(run.sites)}.`;
  const sharing = run.sites.filter(({ layer }) => layer === Number(place));
  if (sharing.length) return `Layer ${place} has ${whole(sharing.length)} sites in this run; give the name of one: ${names(sharing)}.`;
  const layers = [...new Set(run.sites.map(({ layer }) => layer).filter((layer) => layer !== null))];
  return layers.length
    ? `There is no layer ${place} in this run; it has layer${layers.length > 1 ? "s" : ""} ${ranges(layers)}.`
    : `The site names of this run have no layer number; its sites are ${names(run.sites)}.`;
}

/** [1, 10, 11, 12, 13] -> "1 and 10 to 13" */
function ranges(numbers) {
  const parts = [];
  for (const number of [...numbers].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && number === last[1] + 1) last[1] = number;
    else parts.push([number, number]);
  }
  const words = parts.flatMap(([from, to]) => (to > from + 1 ? [`${from} to ${to}`] : from === to ? [`${from}`] : [`${from}`, `${to}`]));
  return words.length > 1 ? `${words.slice(0, -1).join(", ")} and ${words.at(-1)}` : words[0];
}

/**
 * The neuron with a number at a place; a run with one site needs no place.
 * @returns {{site: number, neuron: number} | {problem: string}}  `problem` is a sentence
 */
export function neuronAt(run, place, number) {
  if (place === undefined && run.sites.length > 1) return { problem: `Give a neuron of this run as layer and number, such as ${example(run)}.` };
  const site = place === undefined ? run.sites[0] : siteOf(run, place);
  if (!site) return { problem: noSite(run, place) };
  const neuron = /^\d+$/.test(number ?? "") ? Number(number) : NaN;
  return neuron < site.n_neurons
    ? { site: site.number, neuron }
    : { problem: `${siteName(run, site)} has no neuron ${isolated(number ?? "")}; its neurons are 0 to ${whole(site.n_neurons - 1)}.` };
}

/**
 * The neuron that `text` names, if it names one: "12/345" by the layer, "layers.2/345" or "layers.2 345" by the site's
 * name, or "345" if the run has one site.
 * @returns {{site: number, neuron: number} | {problem: string} | null}  null if the text doesn't look like a neuron
 */
export function findNeuron(run, text) {
  const match = text.trim().match(/^(?:(.+?)\s*([/\s:#])\s*)?(\d+)$/);
  if (!match) return null;
  const [, typed, separator, number] = match;
  const place = typed?.replace(/^layer\s+(?=\d+$)/i, "");
  // Words may end in a number, or be a number.
  const isWords = place === undefined ? run.sites.length > 1 : !siteOf(run, place) && !/^\d+$/.test(place) && separator !== "/";
  return isWords ? null : neuronAt(run, place, number);
}

/** The display name of a site: its name, preceded by its layer if that is its address. */
export function siteName(run, site) {
  const name = isolated(site.name);
  return run.sites.length === 1 || site.address === site.name ? name : `${site.address} · ${name}`;
}

/** The display name of a neuron, such as 12/345; only its number if the run has one site. */
export function neuronName(run, site, neuron) {
  return run.sites.length === 1 ? String(neuron) : `${isolated(site.address)}/${neuron}`;
}

/** An example of a neuron's name, from a site with a numeric address if there is one. */
export function example(run) {
  const site = run.sites.findLast(({ address }) => /^\d+$/.test(address)) ?? run.sites[0];
  return neuronName(run, site, Math.min(345, site.n_neurons - 1));
}
