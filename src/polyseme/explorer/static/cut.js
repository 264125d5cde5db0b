// A neuron's features at one threshold: what every part of its page shows.

import { cut, groups } from "./recut.js";
import { paletteOf } from "./palette.js";

/**
 * @typedef {object} Cut
 * @property {number} threshold
 * @property {boolean} own whether this is the run's own cut
 * @property {Int32Array} labels feature of each example
 * @property {number[][]} features examples of each feature, the most active first
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
  // A damaged run may have lost its trees; then there's the one cut that it made itself.
  const labels = hasTree(neuron) ? cut(neuron.tree, neuron.n, threshold) : Int32Array.from(neuron.examples.feature);
  const { activation } = neuron.examples;
  const features = groups(labels);
  for (const members of features) members.sort((a, b) => activation[b] - activation[a] || a - b);
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

/** Whether there's a tree to cut anew. */
export function hasTree(neuron) {
  return neuron.n < 2 || Boolean(neuron.tree.nodes && neuron.tree.heights);
}

/** The threshold of an address, or the run's own where it has none that is usable. */
export function thresholdOf(query, neuron) {
  const value = Number(query.get("threshold"));
  return value > 0 && value <= 2 && hasTree(neuron) ? value : neuron.site.threshold;
}

/** Number of the run's own feature that has just these examples, or -1. */
export function ownFeature(neuron, members) {
  const { feature } = neuron.examples;
  const number = feature[members[0]];
  if (members.some((example) => feature[example] !== number)) return -1;
  const size = feature.reduce((sum, other) => sum + (other === number), 0);
  return size === members.length ? number : -1;
}
