// A neuron's features at one threshold: what every part of its page shows.

import { cut, groups } from "./recut.js";
import { paletteOf } from "./palette.js";

/**
 * @typedef {object} Cut
 * @property {number} threshold
 * @property {boolean} own whether this is the run's own cut
 * @property {Int32Array} labels feature of each example
 * @property {number[][]} features examples of each feature, strongest first if activations are known
 * @property {number} n how many features
 * @property {number} shared how many of them have two examples or more: features 0 to shared - 1
 * @property {(example: number) => number} place palette place of an example
 */

/**
 * @param {object} neuron as data.js has it
 * @param {number} threshold
 * @returns {Cut}
 */
export function cutNeuron(neuron, threshold) {
  const own = threshold === neuron.site.threshold;
  // A damaged run may lack its trees; then only its own cut is available.
  const labels = hasTree(neuron) ? cut(neuron.tree, neuron.n, threshold) : Int32Array.from(neuron.examples.feature);
  const features = groups(labels);
  for (const members of features) members.sort(strongestFirst(neuron));
  const shared = features.filter((members) => members.length > 1).length;
  return {
    threshold,
    own,
    labels,
    features,
    n: features.length,
    shared,
    place: (example) => paletteOf(labels[example], features[labels[example]].length),
  };
}

/** Whether there is a tree to cut. */
export function hasTree(neuron) {
  return neuron.n < 2 || Boolean(neuron.tree.nodes && neuron.tree.heights);
}

/** Whether the neuron's features are known; a damaged run may lack them. */
export function hasFeatures(neuron) {
  return neuron.n > 0 && (hasTree(neuron) || neuron.examples.feature !== null);
}

/** Compares two examples by activation, for sorting; keeps their order if activations are missing. */
export function strongestFirst({ examples: { activation } }) {
  return (a, b) => (activation ? activation[b] - activation[a] : 0) || a - b;
}

/** Examples that are their own feature, strongest first. */
export function singlesOf(neuron, cut) {
  return cut.features.slice(cut.shared).flat().sort(strongestFirst(neuron));
}

/** Name of the card that holds a feature. */
export function cardOf(cut, feature) {
  return Number(feature) >= cut.shared ? "singles" : feature;
}

/**
 * Names of the cards, as in addresses, in the order in which they are shown.
 *
 * @param {"size" | "maximum"} order  by maximum, single examples are placed by the strongest of them
 * @returns {string[]} features' numbers, and "singles"
 */
export function namesOf(neuron, cut, order) {
  const named = cut.features.slice(0, cut.shared).map((members, feature) => ({ name: String(feature), best: members[0] }));
  if (cut.n > cut.shared) named.push({ name: "singles", best: singlesOf(neuron, cut)[0] });
  const stronger = strongestFirst(neuron);
  if (order === "maximum") named.sort((a, b) => stronger(a.best, b.best));
  return named.map(({ name }) => name);
}

/** Number of the run's own feature with exactly these examples, or -1. */
export function ownFeature(neuron, members) {
  const { feature } = neuron.examples;
  const number = feature[members[0]];
  if (members.some((example) => feature[example] !== number)) return -1;
  const size = feature.reduce((sum, other) => sum + (other === number), 0);
  return size === members.length ? number : -1;
}
