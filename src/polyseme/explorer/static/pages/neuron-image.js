// The page of an image model's neuron.

import { h } from "../dom.js";
import { number, whole } from "../format.js";
import { imageCards } from "../image-cards.js";
import { exampleTiles, Pictures } from "../image-tiles.js";
import { channelSums, largest, legend, pixels, product, signed } from "../images.js";
import { classLogits } from "../logits.js";
import { meaningCards } from "../meaning-cards.js";
import { activeInputs, card, cardsOf, featuresBar, fillNeuron, lost, metricsTable } from "../neuron-frame.js";
import { NeuronView, openNeuron } from "../neuron-view.js";

const TILES_SHOWN = 12; // of a meaning that is folded

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

/** The neuron's weights next to what activates it; only the weights if the images can't be read. */
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
        `What each pixel adds to the activation${typeof baseline === "number" ? `, relative to an input of ${number(baseline)}` : ""}.`),
      pictures && averages(neuron, pictures),
    ];
  if (!pieces.some(Boolean)) return null;
  // A neuron deeper in the model reads other neurons, so its weights are not a picture.
  return card(weights || map || kernel ? "What it reads" : "What activates it", h("div", { class: "reads" }, pieces));
}

function kernelSays([, , channels]) {
  return channels > 1 ? `The weights, summed over the ${whole(channels)} channels that the neuron reads.` : "What the neuron multiplies each value of a patch by.";
}

function averages(neuron, pictures) {
  const { average, averageShape: shape } = pictures.average(Array.from({ length: neuron.n }, (_, i) => i));
  const { activationMap: map } = neuron.image;
  return [
    h("figure", {}, pixels(average, shape, "Average of the examples"),
      h("figcaption", {}, h("strong", {}, "Average example"), h("small", {}, `Mean of ${ofActive(neuron)} inputs that activate the neuron.`))),
    map && map.length === pictures.size && signedFigure("Importance map", product(map, pictures.input(average)), shape, "Activation map ⊙ average example."),
  ];
}

/** A convolution fires anywhere in an image, so its pictures show the patches that it fires for. */
function patches(neuron, pictures) {
  const { places } = pictures;
  const all = Array.from({ length: neuron.n }, (_, i) => i);
  const { average } = pictures.average(all);
  const counts = places?.counts(all, neuron.examples.position);
  return [
    places
      ? h("figure", {}, pixels(average, places.part, "Average patch under the kernel"),
        h("figcaption", {}, h("strong", {}, "Average patch"), h("small", {}, `Mean of the patch under the kernel where the neuron fires most, over ${ofActive(neuron)} inputs that activate it. Because of earlier layers, the neuron may see slightly beyond the patch.`)))
      : h("figure", {}, pixels(average, pictures.shape, "Average of the examples"),
        h("figcaption", {}, h("strong", {}, "Average example"), h("small", {}, `Mean of ${ofActive(neuron)} inputs that activate the neuron, wherever it fires.`))),
    places && h("figure", {}, signed(counts, [...places.grid, 1], "Where in the image the neuron fires most"),
      h("figcaption", {}, h("strong", {}, "Where it fires"), h("small", {}, `Position of the strongest activation in each example, on a grid of ${places.grid.map(whole).join(" × ")}; the darkest cell has ${whole(largest(counts))}. Frames mark it in the images below.`))),
  ];
}

/** Number of examples, and of active inputs, which a damaged run may lack. */
function ofActive(neuron) {
  const active = activeInputs(neuron);
  return active > 0 ? `${whole(neuron.n)} of the ${whole(active)}` : whole(neuron.n);
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
      h("p", { class: "quiet-text small" }, "Mean over the examples: how much of each logit is lost when the neuron is set to 0 (bars), and the first-order estimate (ticks)."), logits),
    pictures && random?.n > 0 && random.thumb && card("Random activating examples",
      h("p", { class: "quiet-text small" }, `${whole(random.n)} of the ${activeInputs(neuron) > 0 ? `${whole(activeInputs(neuron))} ` : ""}inputs that activate the neuron, weakly or strongly, drawn at random.`),
      h("ol", { class: "tiles" }, Array.from({ length: random.n }, (_, i) =>
        h("li", {}, pictures.picture(random.thumb[i], random.position?.[i], `Activation ${number(random.activation[i], 2)}`),
          h("small", { "aria-hidden": "true" }, number(random.activation[i], 2)))))),
    card("All metrics", metricsTable(neuron)));
}
