// What a neuron does to the model's output: tokens that it promotes and suppresses.

import { number } from "./format.js";
import { h } from "./dom.js";
import { tokenChip } from "./tokens.js";

/** @returns {HTMLElement | null} null if the run has no logit effects */
export function tokenLogits(neuron) {
  if (!neuron.promoted?.length && !neuron.suppressed?.length) return null;
  const rows = [...(neuron.promoted ?? []), ...(neuron.suppressed ?? [])];
  const most = Math.max(...rows.map(({ logit }) => Math.abs(logit)), 1e-9);
  const side = (name, found, kind) =>
    h("section", { class: `logit-side ${kind}` },
      h("h3", {}, name),
      h("ol", {}, found.map(({ token, logit }) =>
        h("li", {},
          tokenChip(token),
          h("span", { class: "bar", "aria-hidden": "true" },
            h("span", { style: { width: `${((100 * Math.abs(logit)) / most).toFixed(1)}%` } })),
          h("span", { class: "num" }, number(logit, 3))))));
  return h("div", { class: "logit-sides" },
    side("Promotes", neuron.promoted ?? [], "up"),
    side("Suppresses", neuron.suppressed ?? [], "down"));
}

const CLASSES_SHOWN = 12;

/**
 * What a neuron of a classifier does to each class's logit, averaged over its examples.
 * @param {string[]} names of the classes
 * @returns {HTMLElement | null} null if the run has no logit effects
 */
export function classLogits(neuron, names) {
  const { logitAblation: ablation, logitGradient: gradient } = neuron.image;
  if (!ablation || ablation.every(Number.isNaN)) return null;
  let order = Array.from(ablation.keys());
  if (order.length > CLASSES_SHOWN) {
    order.sort((a, b) => Math.abs(ablation[b]) - Math.abs(ablation[a]));
    order = order.slice(0, CLASSES_SHOWN);
  }
  const most = Math.max(1e-9, ...order.map((c) => Math.max(Math.abs(ablation[c]), Math.abs(gradient[c]))));
  return h("table", { class: "class-logits" },
    h("thead", {}, h("tr", {}, ["Class", "", "By ablation", "First order"].map((name, i) => h(i === 1 ? "td" : "th", { scope: i === 1 ? null : "col", class: i > 1 ? "num" : null }, name)))),
    h("tbody", {}, order.map((c) =>
      h("tr", {},
        h("th", { scope: "row" }, h("bdi", {}, names[c])),
        h("td", { class: "effect-cell" }, effectBar(ablation[c], most, gradient[c])),
        h("td", { class: "num" }, number(ablation[c], 3)),
        h("td", { class: "num" }, number(gradient[c], 3))))));
}

/** A bar from the middle, with a tick for a second value. */
export function effectBar(value, most, tick = NaN) {
  const share = (v) => Math.max(-1, Math.min(1, v / most)) * 50;
  const width = Math.abs(share(value));
  return h("span", { class: "effect", "aria-hidden": "true" },
    h("span", { class: value < 0 ? "down" : "up", style: { left: `${value < 0 ? 50 - width : 50}%`, width: `${width}%` } }),
    Number.isFinite(tick) && h("i", { style: { left: `${50 + share(tick)}%` } }));
}
