// A neuron's meanings: the groups that its examples fall into. They don't depend on the cut of
// its tree of features, and have their own tree.

import * as data from "./data.js";
import { strongestFirst } from "./cut.js";
import { count, number, whole } from "./format.js";
import { paletteOf } from "./palette.js";
import { groups } from "./recut.js";

/** The levels at which a neuron is shown, coarser first. */
export const LEVELS = ["meanings", "features"];

/**
 * The meanings in the form of a cut into features, or null if there are none: the run's own
 * meanings at its own overlap, and wherever other cuts aren't known.
 *
 * @param {object} neuron as data.js has it
 * @param {?number} overlap at which the tree is cut; null for the run's own
 * @param {?object} details of meaningDetails, once they're known
 * @returns {(import("./cut.js").Cut & {about: ?{label: string, medoid: number}[]}) | null} with labels and medoids, once they're known
 */
export function meaningsAt(neuron, overlap = null, details = null) {
  const { meaning } = neuron.examples;
  if (!meaning?.length || !neuron.run.has?.meanings) return null;
  const ownOverlap = neuron.run.meaning_cut.overlap;
  const own = overlap === null || overlap === ownOverlap || !hasAllCuts(details);
  const threshold = own ? ownOverlap : overlap;
  const about = details?.cuts.find((cut) => threshold <= cut.threshold)?.groups.map((place) => details.groups[place]) ?? null;
  const labels = Int32Array.from(meaning);
  if (!own) about.forEach(({ examples }, number) => examples.forEach((example) => (labels[example] = number)));
  // The numbers are unchecked if the run's table of neurons has no counts of meanings.
  if (labels.some((label) => label < 0 || label >= labels.length)) return null;
  const features = Array.from(groups(labels), (members) => members.sort(strongestFirst(neuron)));
  return {
    threshold,
    own,
    about,
    labels,
    features,
    n: features.length,
    shared: features.length,
    place: (example) => paletteOf(labels[example], 2),
  };
}

/** Whether these pages have what takes longer to compute: other cuts, labels, stability, verdict. */
export function hasDetails(run) {
  return Boolean(run.has?.meanings && (data.LIVE || run.meanings_exported));
}

/**
 * What takes longer to compute than the examples of each meaning: all cuts of the tree, each up
 * to a threshold, the groups that they produce, and how reliable the run's own cut is.
 *
 * @returns {Promise<{cuts: {threshold: number, groups: number[]}[], groups: {examples: number[], medoid: number, label: string}[],
 *   separation: ?number, stability: ?number, verdict: ?string, problem: ?string}>}
 */
export function meaningDetails({ run, row }) {
  return data.json(`${run.index}/meanings/${row}.json`);
}

/** Whether the details cover the meanings at every overlap. */
export function hasAllCuts(details) {
  return details?.cuts.at(-1)?.threshold === 1;
}

/** "3 meanings · separation 1.35 · stability 0.72"; stability is known only at the run's own cut. */
export function figuresOf(groups, { separation, stability } = {}) {
  const parts = [["separation", separation], ["stability", groups.own ? stability : null]].filter(([, value]) => Number.isFinite(value));
  return [count(groups.n, "meaning"), ...parts.map(([name, value]) => `${name} ${short(value)}`)].join(" · ");
}

function short(value) {
  return Math.abs(value) < 100 ? value.toFixed(2).replace("-", "−") : number(value);
}

/** A verdict in words, and what it means; null if unknown. @returns {[string, string] | null} */
export function verdictWords(verdict, n) {
  switch (verdict) {
    case "several":
      return ["Several meanings.", "The groups are farther apart than chance explains."];
    case "one":
      return ["One meaning.", "The examples have something in common and don’t fall into groups."];
    case "no clear groups":
      return ["No clear groups.", n > 1
        ? "Examples without groups often look as far apart, so read these groups as a way to sort the examples, not as different meanings."
        : "The examples have almost nothing in common."];
    default:
      return null;
  }
}

/** A warning for a site whose numbers of meanings are unreliable; null for others. */
export function tooFewVectors({ n_moments: n, enough_moments: enough }) {
  return Number.isFinite(n) && n < enough
    ? `The statistics come from ${count(n, "vector")}; numbers of meanings are reliable from about ${whole(enough)}.`
    : null;
}
