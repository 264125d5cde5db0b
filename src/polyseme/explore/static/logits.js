// What a neuron does to the model's output: tokens that it promotes and suppresses.

import { number } from "./format.js";
import { h } from "./dom.js";
import { tokenChip } from "./tokens.js";

/** @returns {HTMLElement | null} null where the run doesn't know */
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
