// A neuron of an image model: what it reads, meaning by meaning.

import { h } from "../dom.js";
import { number, whole } from "../format.js";
import { imageCards } from "../image-cards.js";
import { exampleTiles, Pictures } from "../image-tiles.js";
import { channelSums, largest, legend, pixels, product, signed } from "../images.js";
import { classLogits } from "../logits.js";
import { meaningCards } from "../meaning-cards.js";
import { activeInputs, card, cardsOf, featuresBar, fillNeuron, lost, metricsTable } from "../neuron-frame.js";
import { NeuronView, openNeuron } from "../neuron-view.js";

const TILES_SHOWN = 12; // of a meaning whose features aren't

export async function render(main, ctx) {
  const neuron = await openNeuron(ctx);
  const view = new NeuronView(neuron, ctx);
  main.classList.add("neuron-page");
  const pictures = neuron.thumbs && new Pictures(neuron);
  const readable = Boolean(pictures && neuron.examples.thumb);
  fillNeuron(main, view, {
    features: () => (readable
      ? [reads(neuron, pictures), ...imageFeatures(view, pictures)]
      : [reads(neuron, null), lost("The images of this neuron's examples can't be read.")]),
    tell: (example) => (readable ? [pictures.ofExample(example), number(neuron.examples.activation[example])] : [`Example ${example}`]),
    rest: rest(neuron, pictures),
  });
  view.update(ctx.query);
  return { update: (query) => view.update(query) };
}

/** The meanings or the features, with their examples. */
function imageFeatures(view, pictures) {
  const tiles = exampleTiles(view, pictures);
  const cards = imageCards(view, pictures, tiles);
  const meanings = view.groups && meaningCards(view, { list: "tiles", shown: TILES_SHOWN, item: (example) => tiles.tile(example), element: tiles.element, pictures: tiles.summary, placed: tiles.enlarge });
  if (meanings) tiles.listen(meanings.element);
  view.onOpen.push((example) => tiles.open(example, (view.byMeaning ? meanings : cards).reveal));
  return [featuresBar(view), cardsOf(view, cards, meanings)];
}

/** What the neuron multiplies its input by, and what it fires for, side by side; the former alone without pictures. */
function reads(neuron, pictures) {
  const { image, run } = neuron;
  if (!image) return null;
  const { weights, kernel, activationMap: map } = image;
  const baseline = run.settings?.baseline;
  const pieces = kernel
    ? [signedFigure("Kernel", kernel, image.shapeOf("kernel"), kernelSays(image.shapeOf("kernel"))), pictures && patches(neuron, pictures)]
    : [
      weights && signedFigure("Input weights", weights, image.shapeOf("weights"), "What the neuron multiplies each input by."),
      map && signedFigure("Activation map", map, image.shapeOf("activation_map"),
        `What each pixel adds to the activation${typeof baseline === "number" ? `, from an input of ${number(baseline)}` : ""}.`),
      pictures && averages(neuron, pictures),
    ];
  if (!pieces.some(Boolean)) return null;
  // A neuron deeper in the model reads other neurons: what it reads is no picture.
  return card(weights || map || kernel ? "What it reads" : "What activates it", h("div", { class: "reads" }, pieces));
}

function kernelSays([, , channels]) {
  return channels > 1 ? `Its weights, added up over the ${whole(channels)} channels that it reads.` : "What the neuron multiplies each value of a patch by.";
}

function averages(neuron, pictures) {
  const { average, averageShape: shape } = pictures.average(Array.from({ length: neuron.n }, (_, i) => i));
  const { activationMap: map } = neuron.image;
  return [
    h("figure", {}, pixels(average, shape, "Average of the examples"),
      h("figcaption", {}, h("strong", {}, "Average example"), h("small", {}, `Mean of the ${ofActive(neuron)} inputs that activate it.`))),
    map && map.length === pictures.size && signedFigure("Importance map", product(map, pictures.input(average)), shape, "Activation map ⊙ average example."),
  ];
}

/** A convolution fires anywhere in an image, so its pictures are of the part that it fires for. */
function patches(neuron, pictures) {
  const { places } = pictures;
  const all = Array.from({ length: neuron.n }, (_, i) => i);
  const { average } = pictures.average(all);
  const counts = places?.counts(all, neuron.examples.position);
  return [
    places
      ? h("figure", {}, pixels(average, places.part, "Average of what the kernel covered"),
        h("figcaption", {}, h("strong", {}, "Average patch"), h("small", {}, `Mean, over ${ofActive(neuron)} inputs that activate it, of the part of the image that the kernel covers where it fires most. The layers before may let it see a little beyond.`)))
      : h("figure", {}, pixels(average, pictures.shape, "Average of the examples"),
        h("figcaption", {}, h("strong", {}, "Average example"), h("small", {}, `Mean of the ${ofActive(neuron)} inputs that activate it, wherever in them it fires.`))),
    places && h("figure", {}, signed(counts, [...places.grid, 1], "Where in the image the neuron fires most"),
      h("figcaption", {}, h("strong", {}, "Where it fires"), h("small", {}, `Its strongest place in each example, of ${places.grid.map(whole).join(" × ")}; ${whole(largest(counts))} at the darkest. Frames show it in the images below.`))),
  ];
}

/** How many examples of how many; of a damaged run the latter may be lost. */
function ofActive(neuron) {
  const active = activeInputs(neuron);
  return active > 0 ? `${whole(neuron.n)} of ${whole(active)}` : whole(neuron.n);
}

function signedFigure(title, values, shape, says) {
  return h("figure", {}, signed(values, shape, title),
    h("figcaption", {}, h("strong", {}, title), legend(largest(channelSums(values, shape))), h("small", {}, says)));
}

function rest(neuron, pictures) {
  const { random, run } = neuron;
  const classes = neuron.image?.logitAblation?.length ?? 0;
  const names = run.image?.class_names?.length === classes ? run.image.class_names : Array.from({ length: classes }, (_, c) => String(c));
  const logits = neuron.image && classLogits(neuron, names);
  return h("div", { class: "neuron-rest" },
    logits && card("Effect on the logits",
      h("p", { class: "quiet-text small" }, "Mean over its examples: what is lost when the neuron is set to 0 (bars), and the same to first order (ticks)."), logits),
    pictures && random?.n > 0 && random.thumb && card("Random activating examples",
      h("p", { class: "quiet-text small" }, `${whole(random.n)} of the ${activeInputs(neuron) > 0 ? `${whole(activeInputs(neuron))} ` : ""}inputs that activate it, weakly or strongly, drawn at random.`),
      h("ol", { class: "tiles" }, Array.from({ length: random.n }, (_, i) =>
        h("li", {}, pictures.picture(random.thumb[i], random.position?.[i], `Activation ${number(random.activation[i], 2)}`),
          h("small", { "aria-hidden": "true" }, number(random.activation[i], 2)))))),
    card("All metrics", metricsTable(neuron)));
}
