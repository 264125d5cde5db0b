// A neuron of a language model: what it reads, meaning by meaning.

import * as data from "../data.js";
import { h, replace, uniqueId } from "../dom.js";
import { number } from "../format.js";
import { featureCards } from "../feature-cards.js";
import { importancesOf } from "../importances.js";
import { tokenLogits } from "../logits.js";
import { card, deadNotice, featureChoice, figures, head, metricsTable, side } from "../neuron-frame.js";
import { NeuronView, openNeuron } from "../neuron-view.js";
import { hasImpliedSpaces, plain } from "../tokens.js";
import { exampleLines, textSample } from "../windows.js";

export async function render(main, ctx) {
  const neuron = await openNeuron(ctx);
  const view = new NeuronView(neuron, ctx);
  main.classList.add("neuron-page");
  if (!neuron.n || !neuron.tokens?.window) {
    main.append(head(view), neuron.n ? h("p", { class: "notice bad" }, "The texts of this neuron's examples can't be read.") : deadNotice(neuron), rest(neuron));
  } else {
    fill(main, view);
  }
  view.update(ctx.query);
  return { update: (query) => view.update(query) };
}

function fill(main, view) {
  const { neuron } = view;
  const lines = exampleLines(neuron, view);
  const shading = shadeChoice(view, lines);
  const tell = (example) => snippet(neuron, example);
  const cards = featureCards(neuron, lines, view.signal);
  main.append(
    head(view),
    view.add(figures(neuron)),
    h("div", { class: "neuron-layout" },
      side(view, { tell }),
      h("div", { class: "neuron-features" },
        h("div", { class: "features-bar" }, h("h2", {}, "Features"), view.add(featureChoice(view)), shading.element),
        shading.notice,
        view.add(cards))),
    rest(neuron));
  view.onOpen.push((example) => {
    lines.open(example);
    if (example === null) return;
    cards.reveal(example);
    // A new page is first shown from its top.
    setTimeout(() => lines.line(example).scrollIntoView({ block: "nearest" }));
  });
}

/** Token shades by activation or by importance. */
function shadeChoice(view, lines) {
  const { neuron, ctx } = view;
  const importances = importancesOf(neuron, ctx);
  const name = uniqueId("shade");
  const notice = h("div", {});
  const radios = ["activation", "importance"].map((value) =>
    h("label", {}, h("input", {
      type: "radio", name, value,
      onchange: () => ctx.navigate({ shade: value === "activation" ? null : value }),
    }), value === "activation" ? "Activation" : "Importance"));
  const element = h("div", { class: "shading" },
    h("fieldset", { class: "choice" }, h("legend", { class: "visually-hidden" }, "Shade tokens by"), radios),
    h("span", { class: "shade-key", "aria-hidden": "true" }));
  view.onQuery.push((query) => {
    const shade = query.get("shade") === "importance" ? "importance" : "activation";
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

function rest(neuron) {
  const logits = tokenLogits(neuron);
  const { random, tokens } = neuron;
  const implied = tokens && hasImpliedSpaces(tokens.vocabulary);
  return h("div", { class: "neuron-rest" },
    logits && card("Effect on the next token",
      h("p", { class: "quiet-text small" }, "The neuron's output direction through the unembedding: logits that one unit of activation adds, for a last residual stream of norm √d."), logits),
    random?.n > 0 && random.tokens && card("Random activating examples",
      h("p", { class: "quiet-text small" }, "Drawn from all contexts that activate it, weakly or strongly."),
      h("ol", { class: "lines" }, Array.from({ length: random.n }, (_, i) =>
        h("li", { class: "line random-line" },
          h("span", { class: "line-value" }, number(random.activation[i])),
          textSample(data.windowOf(tokens, i, random.tokens), tokens.before, { implied }))))),
    card("All metrics", metricsTable(neuron)));
}
