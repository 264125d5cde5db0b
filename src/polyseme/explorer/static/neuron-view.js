// The state of a neuron's page: its address, the cuts, and the parts that show it.

import * as data from "./data.js";
import { count, number } from "./format.js";
import { cutNeuron, hasFeatures, hasTree, namesOf } from "./cut.js";
import { links } from "./link.js";
import { neuronAt } from "./lookup.js";
import { neuronAddress } from "./route.js";
import { typing } from "./keys.js";
import { hasAllCuts, hasDetails, LEVELS, meaningDetails, meaningsAt } from "./meanings.js";

const DWELL = 100; // milliseconds on a page before slow requests are sent

/** The neuron that an address names. @throws {data.DataError} if there is none */
export async function openNeuron({ run, params, query }) {
  const found = neuronAt(run, ...(params.length > 1 ? params : [undefined, ...params]));
  if (found.problem) throw new data.DataError(found.problem);
  const neuron = await data.neuron(run, data.rowOf(run, found.site, found.neuron));
  // Meanings at another overlap need the details; without them, the run's own would flash up first.
  if (query.has("overlap") && hasDetails(run)) neuron.details = await meaningDetails(neuron).catch(() => null);
  return neuron;
}

/** Orders in which features are shown; "strongest" lists all examples across features. */
export const ORDERS = ["size", "maximum", "strongest"];

/** What the shading of tokens shows. */
export const SHADES = ["activation", "importance"];

/** What the colours of examples show in the maps. */
export const COLOURS = ["meaning", "feature"];

/** The level of an address that names none: features, if it has a parameter about features. */
function impliedLevel(query) {
  return ["feature", "order", "threshold"].some((name) => query.has(name)) ? "features" : "meanings";
}

/**
 * What an address asks for, and sentences about what is invalid.
 *
 * @param {URLSearchParams} query
 * @param {object} neuron as data.js has it
 * @param {?object} details details of its meanings, once they're known
 */
function read(query, neuron, details) {
  const wrong = [];
  const own = neuron.site.threshold;
  const given = (name, fits, expected, otherwise) => {
    const text = query.get(name);
    if (text === null) return otherwise;
    if (fits(text)) return text;
    wrong.push(`The address has ${name}=${text}, but ${expected}.`);
    return otherwise;
  };
  const asked = given("threshold", (text) => Number(text) > 0 && Number(text) <= 2, `the threshold must be above 0 and at most 2; features are shown at the run's own threshold, ${own}`, null);
  const threshold = asked !== null && hasTree(neuron) ? Number(asked) : own;
  const cut = cutNeuron(neuron, threshold);
  const isBelow = (n) => (text) => /^\d+$/.test(text) && Number(text) < n;
  const ownOverlap = neuron.run.meaning_cut?.overlap;
  const elsewhere = neuron.meaningTree && hasDetails(neuron.run);
  const cutAt = given("overlap", (text) => Number(text) === ownOverlap || (elsewhere && Number(text) > 0 && Number(text) <= 1),
    elsewhere ? `the overlap must be above 0 and at most 1; meanings are shown at the run's own overlap, ${ownOverlap}` : "meanings at other overlaps aren't in this export", null);
  const overlap = cutAt === null || !neuron.run.has?.meanings ? null : Number(cutAt);
  const groups = meaningsAt(neuron, overlap, details);
  const numbers = (n) => (n > 1 ? `from 0 to ${n - 1}` : "0");
  const level = groups ? given("level", (text) => LEVELS.includes(text), `the level must be one of ${LEVELS.join(", ")}`, impliedLevel(query)) : "features";
  return {
    wrong,
    cut,
    overlap,
    groups,
    level,
    meaning: groups && given("meaning", isBelow(groups.n), `the meaning must be ${numbers(groups.n)}; none is open`, null),
    colour: groups ? given("colour", (text) => COLOURS.includes(text), `the colour must be one of ${COLOURS.join(", ")}`, level === "meanings" ? "meaning" : "feature") : "feature",
    order: given("order", (text) => ORDERS.includes(text), `the order must be one of ${ORDERS.join(", ")}`, ORDERS[0]),
    chosen: given("feature", (text) => isBelow(cut.n)(text) || (text === "singles" && cut.n > cut.shared),
      `the feature must be ${numbers(cut.n)} at this threshold; all are shown`, null),
    shade: given("shade", (text) => SHADES.includes(text), `the shade must be one of ${SHADES.join(", ")}`, SHADES[0]),
    example: given("example", isBelow(neuron.n), `the example must be ${numbers(neuron.n)}; none is open`, null),
  };
}

/**
 * @typedef {object} Part
 * @property {(cut: import("./cut.js").Cut, chosen: string | null) => void} show
 */

export class NeuronView {
  /**
   * @param {object} neuron as data.js has it
   * @param {object} ctx see app.js
   */
  constructor(neuron, ctx) {
    this.neuron = neuron;
    this.ctx = ctx;
    this.signal = ctx.signal;
    /** Its meanings at the current cut, or null if the run has none. */
    this.groups = meaningsAt(neuron);
    /** The overlap in the address; null for the run's own. */
    this.overlap = null;
    /** Details of its meanings, once they're known, or in `lost` a sentence why they aren't. */
    this.details = neuron.details ?? null;
    this.lost = null;
    this.link = links((example) => this.open(example));
    /** @type {Part[]} */
    this.parts = [];
    /** Called when the address has changed, before the parts are shown. */
    this.onQuery = [];
    /** Called when another example is opened, or none. */
    this.onOpen = [];
    this.example = null;
    this.chosen = null;
    this.order = ORDERS[0];
    this.shade = SHADES[0];
    this.level = "features";
    this.colour = "feature";
    /** The meaning that the address opens. */
    this.meaning = null;
    this.cut = null;
    /** Sentences about what the address asks for and isn't there. */
    this.wrong = [];
    this._frame = 0;
    this._asked = false;
    if (hasFeatures(neuron)) this._keys();
  }

  add(part) {
    this.parts.push(part);
    return part.element;
  }

  /** Shows what an address asks for. */
  update(query) {
    const { example, ...shown } = hasFeatures(this.neuron) ? read(query, this.neuron, this.details) : {};
    Object.assign(this, shown);
    for (const listener of this.onQuery) listener();
    if (!this.cut) return;
    this._show();
    this._open(example === null ? null : Number(example));
    if (this.byMeaning && !this._asked) this._ask();
  }

  /** Requests the details of its meanings, which take longer. */
  async _ask() {
    this._asked = true;
    if (this.details || !hasDetails(this.neuron.run)) return;
    // Skip neurons that the reader only passes through.
    await new Promise((resolve) => setTimeout(resolve, DWELL));
    if (this.signal.aborted) return;
    try {
      this.details = await meaningDetails(this.neuron);
    } catch (error) {
      this.lost = error.message;
    }
    if (this.signal.aborted) return;
    this.groups = meaningsAt(this.neuron, this.overlap, this.details);
    this._show();
  }

  /** Whether the meanings are available at other overlaps. */
  get canRegroup() {
    return hasAllCuts(this.details);
  }

  _show() {
    for (const part of this.parts) part.show(this.cut, this.chosen);
  }

  /** Cuts the tree of features at a threshold: shown at once, put in the address and announced when settled. */
  setThreshold(threshold, settled) {
    this._cutSoon(settled, () => {
      if (threshold === this.cut.threshold) return false;
      this.cut = cutNeuron(this.neuron, threshold);
      this.chosen = null; // feature 3 at one cut is not feature 3 at the next
      return true;
    }, () => {
      this.go(this.level, { threshold: this.cut.own ? null : threshold, feature: this.chosen }, { replace: true });
      this.ctx.announce(`${count(this.cut.n, "feature")} at ${number(threshold)}`);
    });
  }

  /** Cuts the tree of meanings likewise. */
  setOverlap(overlap, settled) {
    this._cutSoon(settled, () => {
      if (overlap === this.groups.threshold) return false;
      this.overlap = overlap;
      this.groups = meaningsAt(this.neuron, overlap, this.details);
      this.meaning = null;
      return true;
    }, () => {
      this.go(this.level, { overlap: this.groups.own ? null : overlap, meaning: this.meaning }, { replace: true });
      this.ctx.announce(`${count(this.groups.n, "meaning")} at an overlap of ${number(overlap)}`);
    });
  }

  _cutSoon(settled, recut, settle) {
    const now = () => {
      const began = performance.now();
      if (!recut()) return;
      this.wrong = [];
      this._show();
      performance.measure("recut", { start: began });
    };
    // Many events arrive between two frames; only the last one matters.
    cancelAnimationFrame(this._frame);
    if (!settled) {
      this._frame = requestAnimationFrame(now);
      return;
    }
    now();
    settle();
  }

  /** Changes the address and the level, which the address names only if the rest doesn't imply it. */
  go(level, changes, options) {
    const query = new URLSearchParams(location.hash.split("?")[1] ?? "");
    for (const [name, value] of Object.entries(changes)) value === null ? query.delete(name) : query.set(name, value);
    this.ctx.navigate({ ...changes, ...(this.groups && { level: level === impliedLevel(query) ? null : level }) }, options);
  }

  /** Whether examples are shown by meaning. */
  get byMeaning() {
    return this.level === "meanings";
  }

  /** How examples are grouped in the maps. */
  get grouping() {
    return this.colour === "meaning" ? this.groups : this.cut;
  }

  /** Opens an example, or closes the open one. */
  open(example) {
    this._open(example);
    this.ctx.navigate({ example }, { replace: true });
  }

  _open(example) {
    if (example === this.example) return;
    this.example = example;
    for (const listener of this.onOpen) listener(example);
  }

  /** Address of another neuron of the site, keeping the settings of the view. */
  addressOf(neuron) {
    const { run, site } = this.neuron;
    const query = new URLSearchParams(location.hash.split("?")[1] ?? "");
    const kept = Object.fromEntries(["threshold", "overlap", "order", "shade", "level", "colour"].map((name) => [name, query.get(name)]));
    return neuronAddress(run, site.number, neuron, kept);
  }

  /** Address of a feature at the current cut: its number, or "singles". */
  addressOfFeature(feature) {
    const { run, site, neuron } = this.neuron;
    const { own, threshold } = this.cut;
    return neuronAddress(run, site.number, neuron, { threshold: own ? null : threshold, feature });
  }

  /** Number of the previous (-1) or next (1) neuron of the site, or null at the end. */
  neighbour(step) {
    const next = this.neuron.neuron + step;
    return next >= 0 && next < this.neuron.site.n_neurons ? next : null;
  }

  _keys() {
    document.addEventListener("keydown", (event) => {
      if (typing(event) || event.shiftKey) return;
      const step = { j: 1, k: -1 }[event.key];
      if (step) this._nextFeature(step);
      else if (event.key === "Escape" && this.example !== null) this.open(null);
      else return;
      event.preventDefault();
    }, { signal: this.signal });
  }

  _nextFeature(step) {
    const names = namesOf(this.neuron, this.cut, this.order);
    const at = names.indexOf(this.chosen);
    const next = at < 0 ? (step > 0 ? 0 : names.length - 1) : at + step;
    const feature = names[next] ?? null;
    // The address change follows later; another key press must count from here.
    this.chosen = feature;
    this.go("features", { feature });
    this.ctx.announce(feature === null ? "All features" : feature === "singles" ? "Single examples" : `Feature ${feature}`);
  }
}

/** Arrow keys go to the previous and next neurons. */
export function neighbourKeys(view) {
  document.addEventListener("keydown", (event) => {
    if (typing(event) || event.shiftKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = step && view.neighbour(step);
    if (next === null || next === undefined) return;
    event.preventDefault();
    location.hash = view.addressOf(next);
  }, { signal: view.signal });
}
