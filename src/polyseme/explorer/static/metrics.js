// What each column of the table of neurons is called and how to read it, in the words of docs/metrics.md.

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
    reading: "Groups that its examples fall into, whatever the threshold. One neuron’s page says whether chance would make them.",
    kind: "integer",
  },
  n_clusters: {
    label: "Features",
    reading: "Clusters of its examples at the run’s threshold: a magnification, not a count of concepts.",
    kind: "integer",
  },
  separation: {
    label: "Separation",
    reading: "How far its two most different groups are apart: near 0 for halves of one meaning, about 1 for unrelated ones.",
    kind: "number",
  },
  effective_meanings: {
    label: "Effective meanings",
    reading: "As many meanings of equal size would be as diverse: near 1 where one meaning has nearly all examples.",
    kind: "number",
  },
  largest_share: {
    label: "Largest feature",
    reading: "Share of the examples that its largest feature holds; 100% where there is one feature.",
    kind: "share",
  },
  mean_distance: {
    label: "Mean distance",
    reading: "Mean over all pairs of examples: 0 is the same direction, 1 nothing in common.",
    kind: "distance",
  },
  max_distance: {
    label: "Max distance",
    reading: "The two examples that are farthest apart: 0 is the same direction, 2 opposite ones.",
    kind: "distance",
  },
  intra_cluster_distance: {
    label: "Within features",
    reading: "Mean over pairs within a feature; none where every feature is one example.",
    kind: "distance",
  },
  inter_cluster_distance: {
    label: "Across features",
    reading: "Mean over pairs across features; none where there is one feature.",
    kind: "distance",
  },
  background_distance: {
    label: "Background distance",
    reading: "The mean distance that the same weights give to inputs drawn at random.",
    kind: "distance",
  },
  calibrated_distance: {
    label: "Calibrated distance",
    reading:
      "Mean distance less the background: negative where the examples are closer together than any inputs would be.",
    kind: "distance",
  },
  participation_ratio: {
    label: "Participation ratio",
    reading: "How many inputs the neuron reads, in effect; near 1, small distances prove nothing.",
    kind: "number",
  },
  token_density: { label: "Token density", reading: "Share of all tokens that activate the neuron.", kind: "share", log: true },
  density: {
    label: "Density",
    reading: "Share of all inputs that activate the neuron; a text does so if any of its tokens does. 0 for a dead neuron.",
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
    reading: "Mean activation over all inputs, inactive ones counting as 0.",
    kind: "number",
    log: true,
  },
  n_examples: { label: "Examples", reading: "Examples that stand for the neuron; 0 for one that is dead, or none of whose inputs was selected.", kind: "integer" },
};

/** How to show the column `name`; one that the explorer doesn't know goes by its own name. @returns {Metric} */
export function metric(name) {
  return (
    METRICS[name] ?? {
      label: name.replaceAll("_", " ").replace(/^./, (c) => c.toUpperCase()),
      reading: "A column of the run’s own.",
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
