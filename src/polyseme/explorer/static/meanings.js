// A neuron's meanings: the groups that its examples fall into, which don't depend on where its
// tree of features is cut. They have a tree of their own.

import * as data from "./data.js";
import { strongestFirst } from "./cut.js";
import { count, number, whole } from "./format.js";
import { paletteOf } from "./palette.js";
import { groups } from "./recut.js";

/** The levels at which a neuron is shown, the coarser first. */
export const LEVELS = ["meanings", "features"];

/**
 * The meanings as if they were features of a cut, or null where there are none. They are the run's
 * own at its overlap, and wherever its cuts aren't known.
 *
 * @param {object} neuron as data.js has it
 * @param {?number} overlap at which its tree is cut; null for the run's own
 * @param {?object} details of meaningDetails, once they're known
 * @returns {(import("./cut.js").Cut & {about: ?{label: string, medoid: number}[]}) | null} with what each is about, once that's known
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
  // Nothing has checked the numbers of a run whose table of neurons doesn't count its meanings.
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

/** Whether these pages have what takes longer to find out: other cuts, labels, stability, verdict. */
export function hasDetails(run) {
  return Boolean(run.has?.meanings && (data.LIVE || run.meanings_exported));
}

/**
 * What takes longer to find out than which examples each meaning has: all cuts of the tree, each
 * up to a threshold, the groups that they make, and how much the run's own cut is to be believed.
 *
 * @returns {Promise<{cuts: {threshold: number, groups: number[]}[], groups: {examples: number[], medoid: number, label: string}[],
 *   separation: ?number, stability: ?number, verdict: ?string, problem: ?string}>}
 */
export function meaningDetails({ run, row }) {
  return data.json(`${run.index}/meanings/${row}.json`);
}

/** Whether details know what the meanings are at any overlap. */
export function hasAllCuts(details) {
  return details?.cuts.at(-1)?.threshold === 1;
}

/** "3 meanings · separation 1.35 · stability 0.72"; the last is of the run's own cut. */
export function figuresOf(groups, { separation, stability } = {}) {
  const parts = [["separation", separation], ["stability", groups.own ? stability : null]].filter(([, value]) => Number.isFinite(value));
  return [count(groups.n, "meaning"), ...parts.map(([name, value]) => `${name} ${short(value)}`)].join(" · ");
}

function short(value) {
  return Math.abs(value) < 100 ? value.toFixed(2).replace("-", "−") : number(value);
}

/** A verdict in words, and what it means; null for one that is unknown. @returns {[string, string] | null} */
export function verdictWords(verdict, n) {
  switch (verdict) {
    case "several":
      return ["Several meanings.", "The groups are farther apart than chance makes groups of such examples."];
    case "one":
      return ["One meaning.", "The examples have something in common and don’t fall into groups."];
    case "no clear groups":
      return ["No clear groups.", n > 1
        ? "Examples without any groups would often seem as far apart, so take these as a way to sort the examples rather than as different meanings."
        : "The examples have next to nothing in common."];
    default:
      return null;
  }
}

/** Said of a site whose numbers of meanings are not to be relied on; null of any other. */
export function tooFewVectors({ n_moments: n, enough_moments: enough }) {
  return Number.isFinite(n) && n < enough
    ? `Statistics of ${count(n, "vector")}; numbers of meanings are reliable from about ${whole(enough)}.`
    : null;
}
