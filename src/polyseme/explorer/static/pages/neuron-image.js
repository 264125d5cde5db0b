// A neuron of an image model: what it reads, meaning by meaning.

import { h } from "../dom.js";
import { number, whole } from "../format.js";
import { imageCards, Pictures } from "../image-cards.js";
import { channelSums, largest, legend, meanOf, pixels, product, signed } from "../images.js";
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
        side(view, { tell: (example) => [pixels(pictures.thumb(example), pictures.shape), number(neuron.examples.activation[example])] }),
        h("div", { class: "neuron-features" },
          reads(neuron, pictures),
          h("div", { class: "features-bar" }, h("h2", {}, "Features"), view.add(featureChoice(view))),
          view.add(imageCards(view, pictures)))),
      rest(neuron, pictures));
  }
  view.update(ctx.query);
  return { update: (query) => view.update(query) };
}

/** Weights, activation map, average and importance, side by side. */
function reads(neuron, pictures) {
  const { image, run, n } = neuron;
  const { shape } = pictures;
  const average = meanOf(pictures.thumb, Array.from({ length: n }, (_, i) => i), pictures.size);
  const map = image.activationMap;
  const weights = image.weights ?? image.kernel;
  const weightsShape = image.weights ? image.shapeOf("weights") : image.shapeOf("kernel");
  const baseline = run.settings?.baseline;
  const of = `${whole(n)} of ${whole(activeInputs(neuron))}`;
  const pieces = [
    weights && signedFigure(image.weights ? "Input weights" : "Kernel", weights, weightsShape, "What the neuron multiplies each input by."),
    map && signedFigure("Activation map", map, image.shapeOf("activation_map"),
      `What each pixel adds to the activation${typeof baseline === "number" ? `, from an input of ${number(baseline)}` : ""}.`),
    h("figure", {}, pixels(average, shape, "Average of the examples"),
      h("figcaption", {}, h("strong", {}, "Average example"), h("small", {}, `Mean of the ${of} inputs that activate it.`))),
    map && map.length === pictures.size && signedFigure("Importance map", product(map, pictures.input(average)), shape, "Activation map ⊙ average example."),
  ];
  return card("What it reads", h("div", { class: "reads" }, pieces));
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
        h("li", {}, pixels(neuron.thumbs.of(random.thumb[i]), neuron.thumbs.shape, `Activation ${number(random.activation[i], 2)}`),
          h("small", { "aria-hidden": "true" }, number(random.activation[i], 2)))))),
    card("All metrics", metricsTable(neuron)));
}
