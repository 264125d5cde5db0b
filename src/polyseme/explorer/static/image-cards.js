// The features of a neuron that reads images at the current cut: average, feature and examples of
// each; single examples are folded into one card at the end.

import { h } from "./dom.js";
import { markOf, permalink, SINGLES, singlesSummary } from "./cards.js";
import { Gradual, partly } from "./gradual.js";
import { count, number } from "./format.js";
import { pixels } from "./images.js";
import { isChosen } from "./feature-map.js";
import { neuronAddress } from "./route.js";
import { cardOf, namesOf, ownFeature, singlesOf, strongestFirst } from "./cut.js";
import { badge, colourClass, paletteOf } from "./palette.js";

const SHOWN = 12;
const LISTED = 96; // of all examples, by strength
const CLASSES_SHOWN = 5;

/**
 * @param {import("./neuron-view.js").NeuronView} view
 * @param {import("./image-tiles.js").Pictures} pictures
 * @param {object} tiles see image-tiles.js
 */
export function imageCards(view, pictures, tiles) {
  const { neuron, signal } = view;
  const { tile } = tiles;
  const { examples } = neuron;
  const element = h("div", { class: "feature-cards image-cards" });
  const unabridged = new Set();
  let unfolded = false;
  const cards = new Gradual(element, signal);
  let state = null;
  tiles.listen(element);

  function show(cut, chosen) {
    state = { cut, chosen };
    const wanted = namesOf(neuron, cut, view.order).filter((name) => chosen === null || name === cardOf(cut, chosen));
    cards.fill(view.order === "strongest" && chosen === null
      ? [strongest]
      : wanted.map((name, i) => () => (name === "singles" ? singles(i === 0) : card(Number(name)))));
  }

  function card(feature) {
    const { cut, chosen } = state;
    const members = cut.features[feature];
    const place = paletteOf(feature, members.length);
    const all = chosen !== null || unabridged.has(members[0]);
    const rest = members.length - SHOWN;
    return h("section", { class: `card feature ${colourClass(place)}`, dataset: { feature } },
      h("header", {},
        h("h3", {}, h("span", { class: "visually-hidden" }, "Feature "), badge(feature, place)),
        h("span", { class: "feature-size" }, `${members.length} of ${count(neuron.n, "example")}`),
        h("span", { class: "share", "aria-hidden": "true" }, h("span", { style: { width: `${((100 * members.length) / neuron.n).toFixed(2)}%` } })),
        h("span", { class: "quiet-text small" }, `activation up to ${number(examples.activation[members[0]], 2)}`),
        classChips(members), permalink(view, feature)),
      h("div", { class: "feature-body" },
        tiles.summary(members, `feature ${feature}`),
        h("ol", { class: "tiles" }, (all ? members : members.slice(0, SHOWN)).map((example) => tile(example)))),
      rest > 0 && chosen === null && h("button", {
        type: "button", class: "link", "aria-expanded": String(all),
        onclick: () => {
          if (!unabridged.delete(members[0])) unabridged.add(members[0]);
          show(cut, chosen);
          cards.finish();
          element.querySelector(`[data-feature="${feature}"] > button`)?.focus({ preventScroll: true });
        },
      }, all ? `Show ${SHOWN}` : `Show all ${members.length}`),
      similar(members));
  }

  function classChips(members) {
    if (!examples.class) return null;
    const counts = new Map();
    for (const example of members) {
      const name = pictures.className(examples.class[example]) ?? "unknown";
      counts.set(name, (counts.get(name) ?? 0) + 1);
    }
    const order = [...counts].sort((a, b) => b[1] - a[1]);
    const more = order.length - CLASSES_SHOWN;
    return h("span", { class: "chips", "aria-label": "Classes of the examples" },
      order.slice(0, CLASSES_SHOWN).map(([name, n]) => h("span", { class: "chip" }, h("bdi", {}, h("b", {}, name)), `×${n}`)),
      more > 0 && h("span", { class: "quiet-text small" }, `and ${more} more`));
  }

  /** All examples, across features. */
  function strongest() {
    const list = h("ol", { class: "tiles by-strength" });
    const all = Array.from({ length: neuron.n }, (_, i) => i).sort(strongestFirst(neuron));
    const { more, show } = partly(list, all, (example) => tile(example, markOf(state.cut, example)));
    show(unabridged.has("strongest") ? neuron.n : LISTED);
    return h("section", { class: "card feature f-rest" },
      h("header", {}, h("h3", {}, count(neuron.n, "example")), h("span", { class: "quiet-text small" }, "strongest first, each with its feature")),
      list, more);
  }

  function singles(isFirst) {
    const { cut } = state;
    const members = singlesOf(neuron, cut);
    const list = h("ol", { class: "tiles" });
    const details = h("details", { open: unfolded || isFirst },
      singlesSummary(neuron, cut), h("p", { class: "quiet-text small" }, SINGLES, " ", permalink(view, "singles")), list);
    const fill = () => list.childElementCount || list.append(...members.map((example) => tile(example)));
    if (details.open) fill();
    details.addEventListener("toggle", () => {
      unfolded = details.open;
      if (unfolded) fill();
    });
    return h("section", { class: "card feature f-rest" }, details);
  }

  function similar(members) {
    const own = neuron.similar ? ownFeature(neuron, members) : -1;
    if (own < 0 || !neuron.similar[own]?.length) return null;
    const { run, thumbs } = neuron;
    return h("details", { class: "similar" },
      h("summary", {}, `Similar features (${neuron.similar[own].length})`),
      h("ul", { class: "tiles" }, neuron.similar[own].map((other) =>
        h("li", {}, h("a", {
          class: "tile", href: neuronAddress(run, other.site, other.neuron, { feature: other.feature }),
          "aria-label": `Neuron ${other.site}/${other.neuron}, feature ${other.feature}, similarity ${number(other.similarity, 2)}`,
        }, other.thumb >= 0 && pixels(thumbs.of(other.thumb), thumbs.shape)),
        h("small", { "aria-hidden": "true" }, `${other.site}/${other.neuron} #${other.feature}`)))));
  }

  /** Unfolds whatever hides the tile of an example. */
  function reveal(example) {
    const { cut, chosen } = state;
    const item = tiles.element(example);
    cards.finish();
    if (item.isConnected) return;
    const members = cut.features[cut.labels[example]];
    unabridged.add("strongest").add(members[0]);
    unfolded ||= members.length === 1;
    show(cut, chosen !== null && !isChosen(cut, example, chosen) ? null : chosen);
    cards.finish();
  }

  return {
    element,
    reveal,
    show(cut, chosen) {
      show(cut, chosen);
      if (view.example === null) return;
      // A rebuilt card keeps its open example.
      cards.finish();
      tiles.enlarge();
    },
    /** Releases the examples, which are shown elsewhere. */
    hide: () => cards.fill([]),
  };
}
