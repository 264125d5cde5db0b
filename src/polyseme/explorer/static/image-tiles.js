// Examples of a neuron that reads images: the arrays behind its pictures, and a tile for each
// example; the open one is enlarged below.

import { h, replace } from "./dom.js";
import { number, percent, whole } from "./format.js";
import { largest, channelSums, legend, meanOf, pixels, product, signed, toInput } from "./images.js";
import { Places } from "./places.js";
import { address } from "./route.js";

/** The arrays behind a neuron's pictures. */
export class Pictures {
  constructor(neuron) {
    const { run, thumbs, image } = neuron;
    this.neuron = neuron;
    this.shape = thumbs.shape;
    this.size = this.shape.reduce((a, b) => a * b, 1);
    this.thumb = (example) => thumbs.of(neuron.examples.thumb[example]);
    this.toInput = toInput(run.image, this.shape[2]);
    /** For a convolution, where in its images it fired; null if unknown. */
    this.places = neuron.site.convolution && neuron.examples.position ? new Places(neuron.site.convolution, this.shape) : null;
    // A convolution reads a different part of each image, so arrays of the whole image don't apply.
    const fits = (values) => (values?.length === this.size && !image.kernel ? values : null);
    /** The array that an average is multiplied by to show a feature, and its name. */
    this.factor = fits(image.weights) ?? fits(image.activationMap);
    this.factorName = fits(image.weights) ? "weights" : "activation map";
  }

  /** Stored pixels in the model's units. */
  input(values) {
    const channels = this.shape[2];
    return Float64Array.from(values, (value, i) => this.toInput(value, i % channels));
  }

  /** Average of some examples, 0 to 255, and its shape; for a convolution, of the patches under its kernel. */
  average(members) {
    if (!this.places) return { average: meanOf(this.thumb, members, this.size), averageShape: this.shape };
    return { average: this.places.average(this.thumb, members, this.neuron.examples.position), averageShape: this.places.part };
  }

  /** Average and feature of some examples: {average, averageShape, feature: signed or null, shape, name}. */
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

  /** An image, with the place where the neuron fired. */
  picture(thumb, position, label = "") {
    const picture = pixels(this.neuron.thumbs.of(thumb), this.shape, label);
    return this.places && position !== undefined ? h("span", { class: "placed" }, picture, this.places.mark(position)) : picture;
  }

  /** The picture of an example. */
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
 * The tiles of one neuron. A tile is created once and moved when the features change.
 *
 * @param {import("./neuron-view.js").NeuronView} view
 * @param {Pictures} pictures
 */
export function exampleTiles(view, pictures) {
  const { neuron, link, signal } = view;
  const { examples } = neuron;
  const made = new Map(); // pictures of some examples
  const items = new Map(); // the tile of an example
  let open = null;

  /** An example's picture, with a mark if no heading names its feature. */
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

  /** The open example, enlarged, for below its tiles. */
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

  /** Average and feature of some examples, cached by their numbers. `name` says what they are: "feature 3". */
  function summary(members, name) {
    const key = `${name.split(" ")[0]} of ${members.join()}`;
    let known = made.get(key);
    if (!known) {
      const { average, averageShape, feature: values, shape, name: factors } = pictures.of(members);
      known = h("div", { class: "feature-pictures" },
        h("figure", {}, pixels(average, averageShape, `Average of the ${members.length} examples of ${name}`), h("figcaption", {}, "average")),
        values && h("figure", {}, signed(values, shape, `${name.replace(/^./, (c) => c.toUpperCase())}: ${factors}`), h("figcaption", { title: factors }, "feature")));
      made.set(key, known);
    }
    return known;
  }

  link.onPoint(signal, (example) => {
    for (const [other, item] of items) item.classList.toggle("pointed", other === example);
  });

  /** Enlarges the open example, if its tile is in the page. */
  function enlarge() {
    const item = items.get(open);
    if (!item?.isConnected) return;
    document.querySelector(".example-detail")?.remove();
    item.closest(".tiles").after(detail(open));
  }

  return {
    tile,
    element: (example) => items.get(example) ?? tile(example),
    summary,
    enlarge,
    /** Closes the open example, and opens another once its tile is in the page. */
    open(example, reveal) {
      document.querySelector(".example-detail")?.remove();
      items.get(open)?.classList.remove("open");
      items.get(open)?.firstChild.setAttribute("aria-expanded", "false");
      open = example;
      if (example === null) return;
      reveal(example);
      const item = items.get(example);
      item.classList.add("open");
      item.firstChild.setAttribute("aria-expanded", "true");
      enlarge();
      // A new page is first scrolled to its top.
      setTimeout(() => item.scrollIntoView({ block: "nearest" }));
    },
    /** Listens on an element that holds tiles. */
    listen(element) {
      element.addEventListener("pointerover", (event) => {
        const item = event.target.closest?.(".tiles [data-e]");
        link.point(item ? Number(item.dataset.e) : null);
      });
      element.addEventListener("pointerleave", () => link.point(null));
      element.addEventListener("focusin", (event) => {
        const item = event.target.closest?.(".tiles [data-e]");
        if (item) link.point(Number(item.dataset.e));
      });
    },
  };
}
