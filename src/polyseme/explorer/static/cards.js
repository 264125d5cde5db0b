// What feature cards share, for images and texts.

import { cardOf, singlesOf } from "./cut.js";
import { count, number } from "./format.js";
import { h } from "./dom.js";
import { badge } from "./palette.js";

/** Explains single examples; true for any linkage. */
export const SINGLES = "Each of these examples is its own feature: none merges with another below the threshold.";

/** A link to a card at the current cut. @param {string | number} feature its number, or "singles" */
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
    best === Math.max(...activation) && h("span", { class: "small" }, ` including the strongest example, ${number(best)}`));
}

/** A label with the feature of an example. */
export function markOf(cut, example) {
  const feature = cut.labels[example];
  return cardOf(cut, feature) === "singles" ? h("small", {}, "single") : badge(feature, cut.place(example));
}
