// The features of a neuron that reads images: average, feature and examples of each, following
// the cut; single examples are folded into one card at the end.

import { h, replace } from "./dom.js";
import { markOf, permalink, SINGLES, singlesSummary } from "./cards.js";
import { Gradual, partly } from "./gradual.js";
import { count, number, percent, whole } from "./format.js";
import { largest, channelSums, legend, meanOf, pixels, product, signed, toInput } from "./images.js";
import { isChosen } from "./feature-map.js";
import { address, neuronAddress } from "./route.js";
import { cardOf, namesOf, ownFeature, singlesOf, strongestFirst } from "./cut.js";
import { Places } from "./places.js";
import { badge, colourClass, paletteOf } from "./palette.js";

const SHOWN = 12;
const LISTED = 96; // of all examples, by strength
const CLASSES_SHOWN = 5;

/** What a neuron's pictures are made of. */
export class Pictures {
  constructor(neuron) {
    const { run, thumbs, image } = neuron;
    this.neuron = neuron;
    this.shape = thumbs.shape;
    this.size = this.shape.reduce((a, b) => a * b, 1);
    this.thumb = (example) => thumbs.of(neuron.examples.thumb[example]);
    this.toInput = toInput(run.image, this.shape[2]);
    /** For a convolution, where in its images it fired; null where that isn't known. */
    this.places = neuron.site.convolution && neuron.examples.position ? new Places(neuron.site.convolution, this.shape) : null;
    // A convolution's neuron reads another part of each image: arrays of the whole image tell nothing of it.
    const fits = (values) => (values?.length === this.size && !image.kernel ? values : null);
    /** What an average is multiplied by to show a feature, and what that is called. */
    this.factor = fits(image.weights) ?? fits(image.activationMap);
    this.factorName = fits(image.weights) ? "weights" : "activation map";
  }

  /** Stored pixels in the model's units. */
  input(values) {
    const channels = this.shape[2];
    return Float64Array.from(values, (value, i) => this.toInput(value, i % channels));
  }

  /** Average of some examples, 0 to 255, and its shape; of a convolution, of what its kernel covers. */
  average(members) {
    if (!this.places) return { average: meanOf(this.thumb, members, this.size), averageShape: this.shape };
    return { average: this.places.average(this.thumb, members, this.neuron.examples.position), averageShape: this.places.part };
  }

  /** {average, averageShape, feature: signed or null, shape of the feature, its name} of some examples. */
  of(members) {
    const mean = this.average(members);
    const { kernel, embedding, shapeOf } = this.neuron.image;
    if (kernel) {
      const shape = shapeOf("embedding");
      const size = shape ? shape[0] * shape[1] : 0;
      const feature = embedding && meanOf((example) => embedding.subarray(example * size, (example + 1) * size), members, size);
      return { ...mean, feature, shape, name: "patch ⊙ kernel" };
    }
    const feature = this.factor && product(this.input(mean.average), this.factor);
    return { ...mean, feature, shape: this.shape, name: `average ⊙ ${this.factorName}` };
  }

  /** An image of the neuron's, with the place where it fired. */
  picture(thumb, position, label = "") {
    const picture = pixels(this.neuron.thumbs.of(thumb), this.shape, label);
    return this.places && position !== undefined ? h("span", { class: "placed" }, picture, this.places.mark(position)) : picture;
  }

  /** As `picture`, of an example. */
  ofExample(example, label = "") {
    const { thumb, position } = this.neuron.examples;
    return this.picture(thumb[example], position?.[example], label);
  }

  className(c) {
    if (c === undefined || c === null || c < 0) return null;
    return this.neuron.run.image.class_names?.[c] ?? String(c);
  }
}

/**
 * @param {import("./neuron-view.js").NeuronView} view
 * @param {Pictures} pictures
 */
export function imageCards(view, pictures) {
  const { neuron, link, signal } = view;
  const { examples } = neuron;
  const element = h("div", { class: "feature-cards image-cards" });
  const unabridged = new Set();
  const made = new Map(); // pictures of a feature, by its members
  const items = new Map(); // the tile of an example
  let unfolded = false;
  const cards = new Gradual(element, signal);
  let state = null;
  let open = null;

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
        h("span", { class: "quiet-text small" }, `activation ${number(examples.activation[members[0]], 2)} at most`),
        classChips(members), permalink(view, feature)),
      h("div", { class: "feature-body" },
        summary(members, feature),
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

  /** Average and feature, kept as long as the feature has the same examples. */
  function summary(members, feature) {
    const key = members.join();
    let known = made.get(key);
    if (!known) {
      const { average, averageShape, feature: values, shape, name } = pictures.of(members);
      known = h("div", { class: "feature-pictures" },
        h("figure", {}, pixels(average, averageShape, `Average of the ${members.length} examples of feature ${feature}`), h("figcaption", {}, "average")),
        values && h("figure", {}, signed(values, shape, `Feature ${feature}: ${name}`), h("figcaption", { title: name }, "feature")));
      made.set(key, known);
    }
    return known;
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
    return h("span", { class: "chips", "aria-label": "Classes of its examples" },
      order.slice(0, CLASSES_SHOWN).map(([name, n]) => h("span", { class: "chip" }, h("bdi", {}, h("b", {}, name)), `×${n}`)),
      more > 0 && h("span", { class: "quiet-text small" }, `and ${more} more`));
  }

  /** An example's picture; with a mark where its feature isn't told above it. */
  function tile(example, mark = null) {
    let item = items.get(example);
    if (!item) {
      const value = number(examples.activation[example], 2);
      const name = pictures.className(examples.class?.[example]);
      const button = h("button", {
        type: "button", class: "tile", "aria-expanded": String(open === example),
        "aria-label": `Example ${example}${name === null ? "" : `, class ${name}`}, activation ${value}`,
        onclick: () => link.choose(open === example ? null : example),
      }, pictures.ofExample(example));
      item = h("li", { dataset: { e: example } }, button, h("small", { "aria-hidden": "true" }, value), h("span", { class: "tile-mark" }));
      items.set(example, item);
    }
    replace(item.lastChild, mark);
    return item;
  }

  /** All examples, whatever their feature. */
  function strongest() {
    const list = h("ol", { class: "tiles by-strength" });
    const all = Array.from({ length: neuron.n }, (_, i) => i).sort(strongestFirst(neuron));
    const { more, show } = partly(list, all, (example) => tile(example, markOf(state.cut, example)));
    show(unabridged.has("strongest") ? neuron.n : LISTED);
    return h("section", { class: "card feature f-rest" },
      h("header", {}, h("h3", {}, count(neuron.n, "example")), h("span", { class: "quiet-text small" }, "the strongest first, each with its feature")),
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

  /** The example that is open, enlarged, below the tiles that hold it. */
  function detail(example) {
    const name = pictures.className(examples.class?.[example]);
    const own = pictures.of([example]);
    const limit = own.feature && largest(channelSums(own.feature, own.shape));
    return h("div", { class: "example-detail" },
      h("figure", {}, pictures.ofExample(example, `Example ${example}`), h("figcaption", {}, "input")),
      own.feature && h("figure", {}, signed(own.feature, own.shape, `Example ${example}: ${own.name.replace("average", "input")}`),
        h("figcaption", {}, own.name.replace("average", "input"), legend(limit))),
      h("dl", {},
        name !== null && [h("dt", {}, "Class"), h("dd", {}, h("bdi", {}, name))],
        h("dt", {}, "Activation"), h("dd", {}, number(examples.activation[example]), h("small", {}, ` (${percent(examples.activation[example] / neuron.metrics.max_activation)} of the neuron's maximum)`)),
        examples.inputNumber && [h("dt", {}, "Input"), h("dd", {}, whole(examples.inputNumber[example]),
          view.ctx.live.has("classify") && [" ", h("a", { href: address("classify", [], { run: neuron.run.index, input: examples.inputNumber[example] }) }, "Classify")])]));
  }

  view.onOpen.push((example) => {
    element.querySelector(".example-detail")?.remove();
    items.get(open)?.classList.remove("open");
    items.get(open)?.firstChild.setAttribute("aria-expanded", "false");
    open = example;
    if (example === null) return;
    reveal(example);
  });

  function reveal(example) {
    const { cut, chosen } = state;
    const item = items.get(example) ?? tile(example);
    cards.finish();
    if (!item.isConnected) {
      const members = cut.features[cut.labels[example]];
      unabridged.add("strongest").add(members[0]);
      unfolded ||= members.length === 1;
      show(cut, chosen !== null && !isChosen(cut, example, chosen) ? null : chosen);
      cards.finish();
    }
    item.classList.add("open");
    item.firstChild.setAttribute("aria-expanded", "true");
    item.closest(".tiles").after(detail(example));
    // A new page is first shown from its top.
    setTimeout(() => item.scrollIntoView({ block: "nearest" }));
  }

  element.addEventListener("pointerover", (event) => {
    const item = event.target.closest?.(".tiles [data-e]");
    link.point(item ? Number(item.dataset.e) : null);
  });
  element.addEventListener("pointerleave", () => link.point(null));
  element.addEventListener("focusin", (event) => {
    const item = event.target.closest?.(".tiles [data-e]");
    if (item) link.point(Number(item.dataset.e));
  });
  link.onPoint(signal, (example) => {
    for (const [other, item] of items) item.classList.toggle("pointed", other === example);
  });

  return {
    element,
    show(cut, chosen) {
      show(cut, chosen);
      if (open === null) return;
      // A card that is made anew keeps the example that was open in it.
      cards.finish();
      if (items.get(open)?.isConnected) items.get(open).closest(".tiles").after(detail(open));
    },
  };
}
