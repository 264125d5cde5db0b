// A neuron of an image model: what it reads, meaning by meaning.

import { h } from "../dom.js";
import { number, whole } from "../format.js";
import { imageCards, Pictures } from "../image-cards.js";
import { channelSums, largest, legend, pixels, product, signed } from "../images.js";
import { classLogits } from "../logits.js";
import { activeInputs, card, deadNotice, featureChoice, figures, head, metricsTable, side } from "../neuron-frame.js";
import { NeuronView, openNeuron } from "../neuron-view.js";

export async function render(main, ctx) {
  const neuron = await openNeuron(ctx);
  const view = new NeuronView(neuron, ctx);
  main.classList.add("neuron-page");
  const pictures = neuron.thumbs && new Pictures(neuron);
  if (!neuron.n || !pictures || !neuron.examples.thumb) {
    const why = neuron.n ? h("p", { class: "notice bad" }, "The images of this neuron's examples can't be read.") : deadNotice(neuron);
    main.append(head(view), why, rest(neuron, pictures));
  } else {
    main.append(
      head(view),
      view.add(figures(neuron)),
      h("div", { class: "neuron-layout" },
        side(view, { tell: (example) => [pictures.ofExample(example), number(neuron.examples.activation[example])] }),
        h("div", { class: "neuron-features" },
          reads(neuron, pictures),
          h("div", { class: "features-bar" }, h("h2", {}, "Features"), view.add(featureChoice(view))),
          view.add(imageCards(view, pictures)))),
      rest(neuron, pictures));
  }
  view.update(ctx.query);
  return { update: (query) => view.update(query) };
}

/** What the neuron multiplies its input by, and what it fires for, side by side. */
function reads(neuron, pictures) {
  const { image, run, n } = neuron;
  const all = Array.from({ length: n }, (_, i) => i);
  const { average, averageShape: shape } = pictures.average(all);
  const of = `${whole(n)} of ${whole(activeInputs(neuron))}`;
  if (image.kernel) return card("What it reads", h("div", { class: "reads" }, convolution(neuron, pictures, all, average, of)));
  const { weights, activationMap: map } = image;
  const baseline = run.settings?.baseline;
  const pieces = [
    weights && signedFigure("Input weights", weights, image.shapeOf("weights"), "What the neuron multiplies each input by."),
    map && signedFigure("Activation map", map, image.shapeOf("activation_map"),
      `What each pixel adds to the activation${typeof baseline === "number" ? `, from an input of ${number(baseline)}` : ""}.`),
    h("figure", {}, pixels(average, shape, "Average of the examples"),
      h("figcaption", {}, h("strong", {}, "Average example"), h("small", {}, `Mean of the ${of} inputs that activate it.`))),
    map && map.length === pictures.size && signedFigure("Importance map", product(map, pictures.input(average)), shape, "Activation map ⊙ average example."),
  ];
  // A neuron deeper in the model reads other neurons: what it reads is no picture.
  return card(weights || map ? "What it reads" : "What activates it", h("div", { class: "reads" }, pieces));
}

/** A convolution fires anywhere in an image, so its pictures are of the part that it fires for. */
function convolution(neuron, pictures, all, average, of) {
  const { image, examples } = neuron;
  const { places } = pictures;
  const shape = image.shapeOf("kernel");
  const counts = places?.counts(all, examples.position);
  return [
    signedFigure("Kernel", image.kernel, shape, shape[2] > 1 ? `Its weights, added up over the ${whole(shape[2])} channels that it reads.` : "What the neuron multiplies each value of a patch by."),
    places
      ? h("figure", {}, pixels(average, places.part, "Average of what the kernel covered"),
        h("figcaption", {}, h("strong", {}, "Average patch"), h("small", {}, `Mean, over ${of} inputs that activate it, of the part of the image that the kernel covers where it fires most. The layers before may let it see a little beyond.`)))
      : h("figure", {}, pixels(average, pictures.shape, "Average of the examples"),
        h("figcaption", {}, h("strong", {}, "Average example"), h("small", {}, `Mean of the ${of} inputs that activate it, wherever in them it fires.`))),
    places && h("figure", {}, signed(counts, [...places.grid, 1], "Where in the image the neuron fires most"),
      h("figcaption", {}, h("strong", {}, "Where it fires"), h("small", {}, `Its strongest place in each example, of ${places.grid.map(whole).join(" × ")}; ${whole(largest(counts))} at the darkest. Frames show it in the images below.`))),
  ];
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
      h("p", { class: "quiet-text small" }, `${whole(random.n)} of the ${whole(activeInputs(neuron))} inputs that activate it, weakly or strongly, drawn at random.`),
      h("ol", { class: "tiles" }, Array.from({ length: random.n }, (_, i) =>
        h("li", {}, pictures.picture(random.thumb[i], random.position?.[i], `Activation ${number(random.activation[i], 2)}`),
          h("small", { "aria-hidden": "true" }, number(random.activation[i], 2)))))),
    card("All metrics", metricsTable(neuron)));
}
