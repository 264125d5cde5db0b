// The page of a language model's neuron.

import * as data from "../data.js";
import { h, replace, uniqueId } from "../dom.js";
import { number } from "../format.js";
import { featureCards } from "../feature-cards.js";
import { importancesOf } from "../importances.js";
import { tokenLogits } from "../logits.js";
import { meaningCards } from "../meaning-cards.js";
import { card, cardsOf, featuresBar, fillNeuron, lost, metricsTable } from "../neuron-frame.js";
import { NeuronView, openNeuron, SHADES } from "../neuron-view.js";
import { hasImpliedSpaces, plain } from "../tokens.js";
import { exampleLines, textSample } from "../windows.js";

const LINES_SHOWN = 5; // of a meaning that is folded

export async function render(main, ctx) {
  const neuron = await openNeuron(ctx);
  const view = new NeuronView(neuron, ctx);
  main.classList.add("neuron-page");
  const readable = Boolean(neuron.tokens?.window && neuron.examples.activation);
  fillNeuron(main, view, {
    features: () => (readable ? textFeatures(view) : [lost("The texts of this neuron's examples can't be read.")]),
    tell: (example) => (readable ? snippet(neuron, example) : [`Example ${example}`]),
    rest: rest(view),
  });
  view.update(ctx.query);
  return { update: (query) => view.update(query) };
}

/** The meanings or the features, with their examples and controls. */
function textFeatures(view) {
  const lines = exampleLines(view.neuron, view);
  const shading = shadeChoice(view, lines);
  const cards = featureCards(view, lines);
  const meanings = view.groups && meaningCards(view, { list: "lines", shown: LINES_SHOWN, item: (example) => lines.line(example), element: lines.element });
  if (meanings) lines.listen(meanings.element);
  view.onOpen.push((example) => {
    lines.open(example);
    if (example === null) return;
    (view.byMeaning ? meanings : cards).reveal(example);
    // A new page is first scrolled to its top.
    setTimeout(() => lines.element(example).scrollIntoView({ block: "nearest" }));
  });
  return [featuresBar(view, shading.element), shading.notice, cardsOf(view, cards, meanings)];
}

/** Token shades by activation or by importance. */
function shadeChoice(view, lines) {
  const { neuron, ctx } = view;
  const importances = importancesOf(neuron, ctx);
  const name = uniqueId("shade");
  const notice = h("div", {});
  const radios = SHADES.map((value) =>
    h("label", {}, h("input", {
      type: "radio", name, value,
      onchange: () => ctx.navigate({ shade: value === SHADES[0] ? null : value }),
    }), value === "activation" ? "Activation" : "Importance"));
  const element = h("div", { class: "shading" },
    h("fieldset", { class: "choice" }, h("legend", { class: "visually-hidden" }, "Shade tokens by"), radios),
    h("span", { class: "shade-key", "aria-hidden": "true" }));
  view.onQuery.push(() => {
    const { shade } = view;
    for (const label of radios) label.firstChild.checked = label.firstChild.value === shade;
    lines.setShade(shade);
    element.classList.toggle("by-importance", shade === "importance");
    replace(notice, shade === "importance" && importances.notice(() => view._show()));
  });
  return { element, notice };
}

function snippet(neuron, example) {
  const words = data.windowOf(neuron.tokens, example);
  const { before } = neuron.tokens;
  const part = (from, to) => words.slice(from, to).map((word) => plain(word ?? "")).join("");
  return [
    part(Math.max(0, before - 6), before), h("strong", {}, plain(words[before])), part(before + 1, before + 4),
    h("div", {}, number(neuron.examples.activation[example])),
  ];
}

function rest(view) {
  const { neuron } = view;
  const logits = tokenLogits(neuron);
  const { random, tokens } = neuron;
  const implied = tokens && hasImpliedSpaces(tokens.vocabulary);
  return h("div", { class: "neuron-rest" },
    logits && card("Effect on the next token",
      h("p", { class: "quiet-text small" }, "What one unit of activation adds to each token's logit directly through the unembedding, minus the mean over all tokens, because only differences between logits change the prediction. Assumes a final residual stream of norm √d."), logits),
    random?.n > 0 && random.tokens && card("Random activating examples",
      h("p", { class: "quiet-text small" }, "Drawn at random from all contexts that activate the neuron, weakly or strongly."),
      h("ol", { class: "lines" }, Array.from({ length: random.n }, (_, i) =>
        h("li", { class: "line random-line" },
          h("span", { class: "line-value" }, number(random.activation[i])),
          textSample(data.windowOf(tokens, i, random.tokens), tokens.before, { implied }))))),
    card("All metrics", metricsTable(neuron)));
}
