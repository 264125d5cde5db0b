// The address of a view is in the hash, so that it works on any static host:
// #/neuron/3/345?run=1&threshold=0.4

/** @typedef {{page: string, params: string[], query: URLSearchParams}} Route */

/** @returns {Route} */
export function parse(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [page = "", ...params] = path.split("/").map(decode);
  return { page: page || "overview", params, query: new URLSearchParams(query) };
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a stray % in an address typed by hand
  }
}

/** "#/page/param?query"; parameters that are null, undefined or "" are left out, and so is run 0. */
export function address(page, params = [], query = {}) {
  const path = [page === "overview" ? "" : page, ...params].map((p) => encodeURIComponent(p)).join("/");
  const pairs = query instanceof URLSearchParams ? [...query] : Object.entries(query);
  const kept = pairs.filter(
    ([name, value]) => value !== null && value !== undefined && value !== "" && !(name === "run" && String(value) === "0"),
  );
  const text = new URLSearchParams(kept.map(([name, value]) => [name, String(value)])).toString();
  return `#/${path}${text ? `?${text}` : ""}`;
}

/** Address of a neuron's page. `run` is as in data.js, `site` the site's number. */
export function neuronAddress(run, site, neuron, query = {}) {
  return address("neuron", [run.sites[site].address, neuron], { run: run.index, ...query });
}
