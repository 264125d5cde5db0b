// The meanings of a neuron, a card each: a few examples, or when it's opened all of them, feature
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
 * @property {string} list class of a list of them
 * @property {number} shown how many stand for a meaning
 * @property {(example: number) => Node} item
 * @property {(example: number) => HTMLElement} element the same where it is already
 * @property {(members: number[], name: string) => Node} [pictures] of all of some examples
 * @property {() => void} [placed] called when items are where they belong
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
      h("p", { class: "quiet-text small" }, "A card shows the most typical example first, then the strongest.")),
    cards);
  const opened = new Set(); // numbers of the meanings whose features are shown
  const whole = new Set(); // parts of features whose examples are all shown
  let groups = null;
  let cut = null;
  let shown = [];

  /** Shows the meanings, with their features at a cut. */
  function show(next) {
    cut = next;
    // Meaning 3 of one cut is another in the next.
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

  /** Lets go of the examples, which are shown elsewhere. */
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

    /** A meaning's examples are either samples of it or below its features. */
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

  /** What of each feature lies among some examples, most first; single examples together at the end. */
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
    return `All its examples: ${words.join(" and ")}`;
  }

  function partOf(meaning, { name, examples }) {
    const key = `${meaning}/${examples[0]}`;
    const list = h("ol", { class: samples.list });
    const { more, show: listFirst } = partly(list, examples, samples.item);
    listFirst(whole.has(key) ? examples.length : LISTED * (samples.shown > LISTED ? 2 : 1));
    more.addEventListener("click", () => whole.add(key));
    if (name === "singles") {
      return h("section", { class: "meaning-part f-rest" },
        h("header", {}, h("h4", {}, count(examples.length, "single example")), h("span", { class: "quiet-text small" }, "each a feature of its own")), list, more);
    }
    const size = cut.features[name].length;
    const place = paletteOf(name, size);
    return h("section", { class: `meaning-part ${colourClass(place)}`, dataset: { part: name } },
      h("header", {},
        h("h4", {}, h("a", { href: view.addressOfFeature(name) }, h("span", {}, "Feature "), badge(name, place))),
        h("span", { class: "quiet-text small" }, examples.length === size ? `all its ${count(size, "example")}` : `${examples.length} of its ${count(size, "example")}`)),
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

  /** Shows an example wherever it's folded away. */
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

/** Whether chance would make the groups, or why that isn't told. */
function verdictOf({ neuron, groups, details, lost }) {
  const quiet = (...words) => h("p", { class: "quiet-text" }, words);
  if (!hasDetails(neuron.run)) {
    return quiet("What the groups are about, and whether chance would make them, isn’t in these pages. ",
      "Open the run itself: ", h("code", {}, "polyseme explore RUN"), ".");
  }
  if (lost) return h("p", { class: "notice bad" }, lost);
  if (!details) return quiet("Looking whether chance would make such groups…");
  if (details.problem) return h("p", { class: "notice bad" }, details.problem);
  if (!groups.own) {
    const { overlap } = neuron.run.meaning_cut;
    return quiet(`Cut at an overlap of ${groups.threshold}. Whether chance would make such groups is told at the run’s own cut, ${overlap}.`);
  }
  const words = verdictWords(details.verdict, groups.n);
  return words ? h("p", {}, h("strong", {}, words[0]), ` ${words[1]}`)
    : quiet("It has too many examples to tell whether chance would make such groups.");
}
