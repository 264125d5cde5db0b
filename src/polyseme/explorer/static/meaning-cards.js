// The meanings of a neuron, one card each: a few examples or, when opened, all of them, feature
// by feature.

import { count, percent } from "./format.js";
import { h, replace } from "./dom.js";
import { partly } from "./gradual.js";
import { figuresOf, hasDetails, tooFewVectors, verdictWords } from "./meanings.js";
import { badge, colourClass, paletteOf } from "./palette.js";

const LISTED = 6; // examples of each part of a feature

/**
 * How examples are shown.
 *
 * @typedef {object} Samples
 * @property {string} list CSS class of a list of examples
 * @property {number} shown number of examples per meaning
 * @property {(example: number) => Node} item
 * @property {(example: number) => HTMLElement} element the existing element of an example
 * @property {(members: number[], name: string) => Node} [pictures] pictures of a group of examples
 * @property {() => void} [placed] called after items are placed
 */

/**
 * @param {import("./neuron-view.js").NeuronView} view
 * @param {Samples} samples
 */
export function meaningCards(view, samples) {
  const { neuron } = view;
  const figures = h("p", { class: "meaning-figures" });
  const verdict = h("div", { class: "meaning-verdict" });
  const cards = h("div", { class: "feature-cards meaning-cards" });
  const few = tooFewVectors(neuron.site);
  const element = h("div", { class: "meanings" },
    h("div", { class: "meaning-head" }, figures, verdict, few && h("p", { class: "notice" }, few),
      h("p", { class: "quiet-text small" }, "Each card shows the most typical example first, then the strongest.")),
    cards);
  const opened = new Set(); // numbers of the meanings whose features are shown
  const whole = new Set(); // parts of features whose examples are all shown
  let groups = null;
  let cut = null;
  let shown = [];

  /** Shows the meanings, with their features at a cut. */
  function show(next) {
    cut = next;
    // Meaning 3 at one cut is not meaning 3 at the next.
    if (groups && groups.threshold !== view.groups.threshold) opened.clear();
    groups = view.groups;
    const focused = cards.contains(document.activeElement) ? document.activeElement : null;
    const within = focused?.closest("[data-meaning]")?.dataset.meaning;
    shown = groups.features.map((members, meaning) => (members.length ? card(meaning, members) : null));
    cards.replaceChildren(...shown.filter(Boolean).map((one) => one.element));
    cards.classList.toggle("one", cards.childElementCount === 1);
    samples.placed?.();
    if (focused?.isConnected) focused.focus({ preventScroll: true });
    else if (within !== undefined) cards.querySelector(`[data-meaning="${CSS.escape(within)}"] summary`)?.focus({ preventScroll: true });
    replace(figures, figuresOf(groups, { ...neuron.metrics, ...view.details }));
    replace(verdict, verdictOf(view));
  }

  /** Releases the examples, which are shown elsewhere. */
  function hide() {
    cards.replaceChildren();
  }

  function card(meaning, members) {
    const place = paletteOf(meaning, 2);
    const about = groups.about?.[meaning];
    const label = h("p", { class: "meaning-label" },
      about?.label ? h("bdi", {}, about.label) : about && h("span", { class: "quiet-text" }, "nothing distinctive"));
    const sample = h("ol", { class: samples.list });
    const parts = h("div", { class: "meaning-parts" });
    const features = partsOf(members);
    const body = h("details", { class: "meaning-features", open: opened.has(meaning) },
      h("summary", {}, featureWords(features)), parts);

    /** Shows either a sample of the meaning's examples, or all of them by feature. */
    function fill() {
      replace(sample, body.open ? null : fewOf(meaning, members).map(samples.item));
      sample.hidden = body.open;
      replace(parts, body.open ? features.map((part) => partOf(meaning, part)) : null);
      samples.placed?.();
    }
    body.addEventListener("toggle", () => {
      if (body.open === opened.has(meaning)) return;
      if (body.open) opened.add(meaning);
      else opened.delete(meaning);
      fill();
    });

    fill();
    const pictures = samples.pictures?.(members, `meaning ${meaning}`);
    const element = h("section", { class: `card feature meaning ${colourClass(place)}`, dataset: { meaning } },
      h("header", {},
        h("h3", {}, h("span", { class: "visually-hidden" }, "Meaning "), badge(meaning, place)),
        h("span", { class: "feature-size" }, `${members.length} of ${count(neuron.n, "example")}`),
        h("span", { class: "share", "aria-hidden": "true" }, h("span", { style: { width: `${((100 * members.length) / neuron.n).toFixed(2)}%` } })),
        h("span", { class: "quiet-text small" }, percent(members.length / neuron.n))),
      label,
      pictures ? h("div", { class: "feature-body" }, pictures, sample) : sample,
      body);
    return { element, body, fill };
  }

  /** The most typical example, then the strongest. */
  function fewOf(meaning, members) {
    const medoid = groups.about?.[meaning].medoid;
    const first = members.includes(medoid) ? [medoid] : [];
    return [...first, ...members.filter((example) => example !== medoid)].slice(0, samples.shown);
  }

  /** Groups examples by feature, largest group first; single examples together at the end. */
  function partsOf(members) {
    const found = new Map();
    for (const example of members) {
      const feature = cut.labels[example];
      const name = cut.features[feature].length > 1 ? feature : "singles";
      if (!found.has(name)) found.set(name, []);
      found.get(name).push(example);
    }
    const rank = ({ name, examples }) => (name === "singles" ? -1 : examples.length);
    return [...found].map(([name, examples]) => ({ name, examples })).sort((a, b) => rank(b) - rank(a) || a.name - b.name);
  }

  function featureWords(features) {
    const n = features.filter(({ name }) => name !== "singles").length;
    const single = features.find(({ name }) => name === "singles")?.examples.length ?? 0;
    const words = [n && count(n, "feature"), single && count(single, "single example")].filter(Boolean);
    return `All examples: ${words.join(" and ")}`;
  }

  function partOf(meaning, { name, examples }) {
    const key = `${meaning}/${examples[0]}`;
    const list = h("ol", { class: samples.list });
    const { more, show: listFirst } = partly(list, examples, samples.item);
    listFirst(whole.has(key) ? examples.length : LISTED * (samples.shown > LISTED ? 2 : 1));
    more.addEventListener("click", () => whole.add(key));
    if (name === "singles") {
      return h("section", { class: "meaning-part f-rest" },
        h("header", {}, h("h4", {}, count(examples.length, "single example")), h("span", { class: "quiet-text small" }, "each its own feature")), list, more);
    }
    const size = cut.features[name].length;
    const place = paletteOf(name, size);
    return h("section", { class: `meaning-part ${colourClass(place)}`, dataset: { part: name } },
      h("header", {},
        h("h4", {}, h("a", { href: view.addressOfFeature(name) }, h("span", {}, "Feature "), badge(name, place))),
        h("span", { class: "quiet-text small" }, examples.length === size ? `all ${count(size, "example")}` : `${examples.length} of ${count(size, "example")}`)),
      list, more);
  }

  /** Opens a meaning's features. */
  function open(meaning) {
    opened.add(meaning);
    const one = shown[meaning];
    if (!one || one.body.open) return;
    one.body.open = true;
    one.fill();
  }

  /** Unfolds whatever hides an example. */
  function reveal(example) {
    if (samples.element(example).isConnected) return;
    const meaning = groups.labels[example];
    const part = partsOf(groups.features[meaning]).find(({ examples }) => examples.includes(example));
    whole.add(`${meaning}/${part.examples[0]}`);
    opened.add(meaning);
    show(cut);
  }

  return { element, show, hide, open, reveal };
}

/** Whether chance explains the groups, or why that isn't known. */
function verdictOf({ neuron, groups, details, lost }) {
  const quiet = (...words) => h("p", { class: "quiet-text" }, words);
  if (!hasDetails(neuron.run)) {
    return quiet("Labels, and whether chance explains the groups, aren’t in this export. ",
      "Open the run itself: ", h("code", {}, "polyseme explore RUN"), ".");
  }
  if (lost) return h("p", { class: "notice bad" }, lost);
  if (!details) return quiet("Checking whether chance explains the groups…");
  if (details.problem) return h("p", { class: "notice bad" }, details.problem);
  if (!groups.own) {
    const { overlap } = neuron.run.meaning_cut;
    return quiet(`Cut at an overlap of ${groups.threshold}. Whether chance explains the groups is known only at the run’s own overlap, ${overlap}.`);
  }
  const words = verdictWords(details.verdict, groups.n);
  return words ? h("p", {}, h("strong", {}, words[0]), ` ${words[1]}`)
    : quiet("This neuron has too many examples to test whether chance explains the groups.");
}
