// Names of the columns of the table of neurons, and how to read them, in the words of docs/metrics.md.

/**
 * @typedef {object} Metric
 * @property {string} label
 * @property {string} reading  one sentence
 * @property {"integer"|"distance"|"share"|"number"} kind
 * @property {boolean} [log]  spans orders of magnitude
 */

/** @type {Record<string, Metric>} */
const METRICS = {
  n_meanings: {
    label: "Meanings",
    reading: "Groups that the examples fall into, independent of the threshold. The neuron’s page says whether chance explains them.",
    kind: "integer",
  },
  n_clusters: {
    label: "Features",
    reading: "Clusters of the examples at the run’s threshold: a magnification, not a count of concepts.",
    kind: "integer",
  },
  separation: {
    label: "Separation",
    reading: "How different its two most different groups are: near 0 for two halves of one meaning, about 1 for unrelated meanings.",
    kind: "number",
  },
  effective_meanings: {
    label: "Effective meanings",
    reading: "The number of equally large meanings that would be as diverse: near 1 if one meaning has nearly all examples.",
    kind: "number",
  },
  largest_share: {
    label: "Largest feature",
    reading: "Share of the examples in the largest feature; 100% if there is only one.",
    kind: "share",
  },
  mean_distance: {
    label: "Mean distance",
    reading: "Mean over all pairs of examples: 0 is the same direction, 1 is nothing in common.",
    kind: "distance",
  },
  max_distance: {
    label: "Max distance",
    reading: "Distance of the two examples farthest apart: 0 is the same direction, 2 is the opposite direction.",
    kind: "distance",
  },
  intra_cluster_distance: {
    label: "Within features",
    reading: "Mean over pairs in the same feature; undefined if every feature is a single example.",
    kind: "distance",
  },
  inter_cluster_distance: {
    label: "Across features",
    reading: "Mean over pairs in different features; undefined if there is only one feature.",
    kind: "distance",
  },
  background_distance: {
    label: "Background distance",
    reading: "The mean distance that the same weights give to random inputs.",
    kind: "distance",
  },
  calibrated_distance: {
    label: "Calibrated distance",
    reading:
      "Mean distance minus background distance: negative if the examples are closer together than random inputs.",
    kind: "distance",
  },
  participation_ratio: {
    label: "Participation ratio",
    reading: "The effective number of inputs that the neuron reads; near 1, small distances prove nothing.",
    kind: "number",
  },
  token_density: { label: "Token density", reading: "Share of all tokens that activate the neuron.", kind: "share", log: true },
  density: {
    label: "Density",
    reading: "Share of all inputs that activate the neuron; a text counts if any of its tokens does. 0 for a dead neuron.",
    kind: "share",
    log: true,
  },
  max_activation: {
    label: "Max activation",
    reading: "The strongest activation over all inputs.",
    kind: "number",
    log: true,
  },
  mean_activation: {
    label: "Mean activation",
    reading: "Mean activation over all inputs, counting inactive inputs as 0.",
    kind: "number",
    log: true,
  },
  n_examples: { label: "Examples", reading: "Selected examples of the neuron; 0 if it is dead, or if no input that activates it was selected.", kind: "integer" },
};

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
