// What the cards of features have in common, whatever the neuron reads.

import { cardOf, singlesOf } from "./cut.js";
import { count, number } from "./format.js";
import { h } from "./dom.js";
import { badge } from "./palette.js";

/** Of single examples; it holds with any linkage. */
export const SINGLES = "None of these was merged with another below the threshold, so each is a feature of its own.";

/** A link to a card at the present cut. @param {string | number} feature its number, or "singles" */
export function permalink(view, feature) {
  const title = feature === "singles" ? "Link to the single examples" : `Link to feature ${feature}`;
  return h("a", { class: "permalink", href: view.addressOfFeature(feature), "aria-label": title, title }, "#");
}

/** How many single examples there are, and whether the neuron's strongest is one of them. */
export function singlesSummary(neuron, cut) {
  const examples = singlesOf(neuron, cut);
  const { activation } = neuron.examples;
  const best = activation[examples[0]];
  return h("summary", {}, h("h3", {}, count(examples.length, "single example")),
    best === Math.max(...activation) && h("span", { class: "small" }, ` with the strongest example of all, ${number(best)}`));
}

/** The feature of an example, to stand beside it. */
export function markOf(cut, example) {
  const feature = cut.labels[example];
  return cardOf(cut, feature) === "singles" ? h("small", {}, "single") : badge(feature, cut.place(example));
}
