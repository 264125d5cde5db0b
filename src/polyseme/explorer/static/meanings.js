// A neuron's meanings: the groups that its examples fall into, which don't depend on where its
// tree is cut into features.

import * as data from "./data.js";
import { strongestFirst } from "./cut.js";
import { count, number, whole } from "./format.js";
import { paletteOf } from "./palette.js";

/** The levels at which a neuron is shown, the coarser first. */
export const LEVELS = ["meanings", "features"];

/**
 * The meanings as if they were features of a cut, or null where there are none.
 *
 * @param {object} neuron as data.js has it
 * @returns {import("./cut.js").Cut | null}
 */
export function meaningsOf(neuron) {
  const { meaning } = neuron.examples;
  if (!meaning?.length || !neuron.run.has?.meanings) return null;
  const labels = Int32Array.from(meaning);
  const groups = [];
  // Nothing has checked the numbers of a run whose table of neurons doesn't count its meanings.
  if (labels.some((label) => label < 0 || label >= labels.length)) return null;
  labels.forEach((label, example) => (groups[label] ??= []).push(example));
  const features = Array.from(groups, (members) => (members ?? []).sort(strongestFirst(neuron)));
  return {
    threshold: neuron.site.threshold,
    own: true,
    labels,
    features,
    n: features.length,
    shared: features.length,
    place: (example) => paletteOf(labels[example], 2),
  };
}

/**
 * What takes longer to find out than which examples each meaning has: labels, stability, verdict.
 * Null where these pages don't have it.
 *
 * @returns {Promise<{meanings: object[], separation: ?number, stability: ?number, verdict: ?string, problem: ?string}> | null}
 */
export function meaningDetails(neuron) {
  const { run, row } = neuron;
  const known = run.has?.meanings && (data.LIVE || run.meanings_exported);
  return known ? data.json(`${run.index}/meanings/${row}.json`) : null;
}

/** "3 meanings · separation 1.35 · stability 0.72" */
export function figuresOf(groups, { separation, stability } = {}) {
  const parts = [["separation", separation], ["stability", stability]].filter(([, value]) => Number.isFinite(value));
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
