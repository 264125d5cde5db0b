// Names of the columns of the table of neurons, and how to read them: polyseme/views/columns.json.

/**
 * @typedef {object} Metric
 * @property {string} label
 * @property {string} reading  one sentence
 * @property {"integer"|"distance"|"share"|"number"} kind
 * @property {boolean} [log]  spans orders of magnitude
 */

/** By column, the well-known ones in the order to show them. @type {Record<string, Metric>} */
let METRICS = {};

/** Takes the metrics from data/runs.json, which is read before any page is drawn. */
export function setMetrics(metrics) {
  METRICS = metrics;
}

/** How to show the column `name`; a column unknown to the explorer keeps its own name. @returns {Metric} */
export function metric(name) {
  return (
    METRICS[name] ?? {
      label: name.replaceAll("_", " ").replace(/^./, (c) => c.toUpperCase()),
      reading: "An additional column of this run.",
      kind: "number",
    }
  );
}

/** The metrics among a table's columns, the well-known ones first. @returns {string[]} */
export function metricNames(names) {
  const known = Object.keys(METRICS).filter((name) => names.includes(name));
  const others = names.filter((name) => name !== "site" && name !== "neuron" && !Object.hasOwn(METRICS, name));
  return [...known, ...others];
}
