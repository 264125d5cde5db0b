// The features of a neuron that reads texts, one card each, largest first; single examples
// are folded into one card at the end.

import { count, number } from "./format.js";
import { h } from "./dom.js";
import { Gradual, partly } from "./gradual.js";
import { neuronAddress } from "./route.js";
import { siteName } from "./lookup.js";
import { markOf, permalink, SINGLES, singlesSummary } from "./cards.js";
import { cardOf, namesOf, ownFeature, singlesOf, strongestFirst } from "./cut.js";
import { isChosen } from "./feature-map.js";
import { badge, colourClass, paletteOf } from "./palette.js";
import { distinctive } from "./recut.js";
import { hasImpliedSpaces, tokenChip } from "./tokens.js";
import { textSample } from "./windows.js";

const SHOWN = 6;
const LISTED = 24; // of single examples, and of all by strength
const LABEL_TOKENS = 5;
const SAMPLE_BEFORE = 8; // tokens before the activating one in a sample of a similar feature

/**
 * @param {import("./neuron-view.js").NeuronView} view
 * @param {object} lines see windows.js
 * @returns {{element: HTMLElement, show: (cut: object, chosen: string | null) => void}}
 */
export function featureCards(view, lines) {
  const { neuron, signal } = view;
  const element = h("div", { class: "feature-cards" });
  const whole = new Set(); // first examples of features whose examples are all shown, "singles", "strongest"
  let unfolded = false; // the single examples
  const cards = new Gradual(element, signal);
  let state = null;
  lines.listen(element);

  /** @param {object} cut @param {string | null} chosen a feature's number, "singles", or null for all */
  function show(cut, chosen) {
    state = { cut, chosen };
    const names = tokensOf(cut);
    const wanted = namesOf(neuron, cut, view.order).filter((name) => chosen === null || name === cardOf(cut, chosen));
    const makers = view.order === "strongest" && chosen === null
      ? [strongest]
      : wanted.map((name, i) => () => (name === "singles" ? singles(i === 0) : card(Number(name), names[name])));
    element.classList.toggle("one", makers.length === 1);
    cards.fill(makers);
  }

  function tokensOf(cut) {
    const { tokens } = neuron;
    return distinctive(tokens.window, tokens.width, tokens.before, cut.labels, LABEL_TOKENS);
  }

  function card(feature, tokens) {
    const { cut, chosen } = state;
    const members = cut.features[feature];
    const place = paletteOf(feature, members.length);
    const all = chosen !== null || whole.has(members[0]);
    const shown = all ? members : members.slice(0, SHOWN);
    const activations = members.map((example) => neuron.examples.activation[example]);
    const mean = activations.reduce((a, b) => a + b, 0) / members.length;
    return h("section", { class: `card feature ${colourClass(place)}`, dataset: { feature } },
      h("header", {},
        h("h3", {}, h("span", { class: "visually-hidden" }, "Feature "), badge(feature, place)),
        h("span", { class: "feature-size" }, `${members.length} of ${count(neuron.n, "example")}`),
        h("span", { class: "share", "aria-hidden": "true" }, h("span", { style: { width: percentOf(members.length) } })),
        h("span", { class: "quiet-text small" }, `activation up to ${number(activations[0])}, mean ${number(mean)}`),
        permalink(view, feature)),
      h("p", { class: "chips", "aria-label": "Distinctive tokens" },
        tokens.map((token) => tokenChip(neuron.tokens.vocabulary[token]))),
      h("ol", { class: "lines" }, shown.map((example) => lines.line(example))),
      members.length > SHOWN && chosen === null && h("button", {
        type: "button", class: "link", "aria-expanded": String(all),
        onclick: () => {
          if (all) whole.delete(members[0]);
          else whole.add(members[0]);
          refresh(feature);
        },
      }, all ? `Show ${SHOWN}` : `Show all ${members.length}`),
      similar(members));
  }

  function percentOf(size) {
    return `${((100 * size) / neuron.n).toFixed(2)}%`;
  }

  /** Redraws one card, keeping the focus on its button. */
  function refresh(feature) {
    show(state.cut, state.chosen);
    cards.finish();
    element.querySelector(`[data-feature="${feature}"] > button`)?.focus({ preventScroll: true });
  }

  /** All examples, across features. */
  function strongest() {
    const list = h("ol", { class: "lines by-strength" });
    const examples = Array.from({ length: neuron.n }, (_, i) => i).sort(strongestFirst(neuron));
    const { more, show } = partly(list, examples, (example) => lines.line(example, markOf(state.cut, example)));
    show(whole.has("strongest") ? neuron.n : LISTED);
    return h("section", { class: "card feature f-rest" },
      h("header", {}, h("h3", {}, count(neuron.n, "example")), h("span", { class: "quiet-text small" }, "strongest first, each with its feature")),
      list, more);
  }

  function singles(isFirst) {
    const { cut } = state;
    const examples = singlesOf(neuron, cut);
    const list = h("ol", { class: "lines" });
    const { more, show } = partly(list, examples, (example) => lines.line(example));
    // Create lines only when they are shown.
    const fill = () => show(whole.has("singles") ? examples.length : LISTED);
    const details = h("details", { open: unfolded || isFirst },
      singlesSummary(neuron, cut), h("p", { class: "quiet-text small" }, SINGLES, " ", permalink(view, "singles")), list, more);
    if (details.open) fill();
    details.addEventListener("toggle", () => {
      unfolded = details.open;
      if (unfolded) fill();
    });
    return h("section", { class: "card feature f-rest" }, details);
  }

  function similar(members) {
    if (!neuron.similar) return null;
    const own = ownFeature(neuron, members);
    if (own < 0) {
      return h("p", { class: "quiet-text small" }, "Similar features are known only at the run’s own cut.");
    }
    const found = neuron.similar[own];
    if (!found?.length) return null;
    const implied = hasImpliedSpaces(neuron.tokens.vocabulary);
    const details = h("details", { class: "similar" }, h("summary", {}, `Similar features (${found.length})`));
    details.addEventListener("toggle", () => {
      if (details.childElementCount > 1) return;
      details.append(h("ol", { class: "lines" }, found.map((other) => similarLine(other, implied))));
    });
    return details;
  }

  function similarLine(other, implied) {
    const site = neuron.run.sites.find((s) => s.number === other.site);
    return h("li", { class: "line similar-line" },
      h("a", {
        href: neuronAddress(neuron.run, other.site, other.neuron, { feature: other.feature }),
        title: `${siteName(neuron.run, site)}, neuron ${other.neuron}, feature ${other.feature}`,
      }, `${other.site}/${other.neuron}`, h("small", {}, ` #${other.feature}`)),
      h("span", { class: "line-value", title: "similarity" }, number(other.similarity, 2)),
      other.tokens && textSample(other.tokens, SAMPLE_BEFORE, { implied }));
  }

  /** Unfolds whatever hides the line of an example. */
  function reveal(example) {
    const { cut, chosen } = state;
    const members = cut.features[cut.labels[example]];
    cards.finish();
    if (lines.element(example).isConnected) return;
    for (const name of ["strongest", members.length > 1 ? members[0] : "singles"]) whole.add(name);
    unfolded ||= members.length === 1;
    show(cut, chosen !== null && !isChosen(cut, example, chosen) ? null : chosen);
    cards.finish();
  }

  /** Releases the examples, which are shown elsewhere. */
  function hide() {
    cards.fill([]);
  }

  return { element, show, hide, reveal };
}
