// The method, its sources, and what the metrics mean and do not mean.

import * as data from "../data.js";
import { h } from "../dom.js";
import { factList } from "../facts.js";
import { whole } from "../format.js";
import { metric, metricNames } from "../metrics.js";

export async function render(main, ctx) {
  const { run } = ctx;
  const table = await data.neurons(run);
  main.append(
    h("h1", {}, "About"),
    h(
      "div",
      { class: "about" },
      h("div", {}, method(), metrics(table.names), limits()),
      h("div", {}, settings(run), keys(), citation()),
    ),
  );
}

function section(title, ...children) {
  return h("section", {}, h("h2", {}, title), children);
}

function method() {
  return section(
    "The method",
    h(
      "p",
      {},
      "A neuron of a trained network often fires for several unrelated reasons, and a list of its strongest examples mixes them up. For each example, polyseme looks at how the neuron’s input ",
      h("i", {}, "h"),
      " met the neuron’s weights ",
      h("i", {}, "w"),
      ": their elementwise product ",
      h("code", {}, "h ⊙ w"),
      " is the ",
      h("strong", {}, "neuron embedding"),
      " of the example. The embeddings of two examples that activate the neuron through the same weights point in the same direction, whatever else is in their inputs.",
    ),
    h(
      "p",
      {},
      "The embeddings of a neuron’s examples are clustered by cosine distance, and each cluster is called a ",
      h("strong", {}, "feature"),
      ": a group of examples that show one behaviour. The whole tree of merges is kept, so you can move the threshold on a neuron’s page, and the features follow at once.",
    ),
    h(
      "p",
      {},
      "For a neuron that isn’t linear in its input, such as one with a gate, the embedding is ",
      h("code", {}, "h ⊙ ∂a/∂h"),
      ", one-layer gradient × input, which points the same way as ",
      h("code", {}, "h ⊙ w"),
      " for a linear one.",
    ),
  );
}

function metrics(names) {
  return section(
    "What the metrics mean",
    h("p", {}, "All distances are cosine distances between the neuron embeddings of one neuron’s examples, from 0 (the same direction) through 1 (nothing in common) to 2 (opposite directions)."),
    h(
      "dl",
      { class: "glossary" },
      metricNames(names).map((name) => {
        const { label, reading } = metric(name);
        return h("div", {}, h("dt", {}, label, " ", h("code", { class: "quiet-text" }, name)), h("dd", {}, reading));
      }),
    ),
  );
}

function limits() {
  return section(
    "What they do not mean",
    h(
      "p",
      {},
      h("strong", {}, "Small distances alone do not make a neuron monosemantic."),
      " If nearly all the weight is on one input, every embedding points along that input, and all distances go to 0, whatever the examples are. Such a neuron has a participation ratio near 1 and a background distance near 0, so its calibrated distance is near 0 too.",
    ),
    h(
      "p",
      {},
      h("strong", {}, "The number of features depends on the threshold,"),
      " and no threshold suits all layers. It is a magnification, not a count of concepts: move the threshold and watch what merges.",
    ),
    h(
      "p",
      {},
      h("strong", {}, "Metrics depend on the examples."),
      " Metrics of the strongest examples say nothing about weaker ones. Report the selection with the metric; the run’s settings record it.",
    ),
    h("p", {}, h("strong", {}, "Each mean covers only the neurons that have a value."), " The more neurons of a layer have no examples, dead or not, the fewer its means cover. Always report the counts."),
  );
}

function settings(run) {
  return section(
    "This run",
    h("h3", { class: "run-title" }, h("bdi", {}, run.title)),
    factList(run),
    h(
      "div",
      { class: "scroll-x", tabindex: 0, role: "region", "aria-label": "Layers of this run" },
      h(
        "table",
        { class: "plain" },
        h("thead", {}, h("tr", {}, ["Layer", "Site", "Neurons", "Kind", "Activation", "Inputs", "Threshold"].map((name, i) => h("th", { scope: "col", class: [0, 2, 5, 6].includes(i) ? "num" : null }, name)))),
        h(
          "tbody",
          {},
          run.sites.map((site) =>
            h(
              "tr",
              {},
              h("td", { class: "num" }, site.layer ?? "–"),
              h("th", { scope: "row" }, h("bdi", {}, site.name)),
              h("td", { class: "num" }, whole(site.n_neurons)),
              h("td", {}, site.kind),
              h("td", {}, site.gate ?? site.activation ?? "–"),
              h("td", { class: "num" }, whole(site.d_in)),
              h("td", { class: "num" }, site.threshold),
            ),
          ),
        ),
      ),
    ),
    h(
      "details",
      {},
      h("summary", {}, "All metadata of the run"),
      h("pre", { class: "record", tabindex: 0 }, JSON.stringify({ created: run.created, polyseme_version: run.polyseme_version, model: run.model, data: run.data, settings: run.settings }, null, 2)),
    ),
  );
}

function keys() {
  const rows = [
    [["/"], "Search"],
    [["←", "→"], "Previous and next neuron, on a neuron’s page"],
    [["↑", "↓"], "Move between rows in a table of neurons; Page Up, Page Down, Home and End work too"],
    [["j", "k"], "Next and previous feature, on a neuron’s page; Escape closes the open example"],
    [["+", "−", "0"], "Zoom in, zoom out and show all, in the map of neurons; the arrow keys pan"],
  ];
  return section(
    "Keyboard shortcuts",
    h("dl", { class: "keys" }, rows.map(([names, words]) => h("div", {}, h("dt", {}, names.map((name) => [h("kbd", {}, name), " "])), h("dd", {}, words)))),
  );
}

function citation() {
  const paper = (href, ...words) => h("li", {}, words, " ", h("a", { href, rel: "noreferrer" }, href.replace("https://arxiv.org/abs/", "arXiv:")), ".");
  return section(
    "Sources",
    h(
      "ul",
      {},
      paper("https://arxiv.org/abs/2411.08166", "The method: A. Foote, ", h("cite", {}, "Tackling Polysemanticity with Neuron Embeddings"), ", 2024,"),
      paper("https://arxiv.org/abs/2404.06453", "One-layer gradient × input is one-layer PURE: M. Dreyer et al., ", h("cite", {}, "PURE: Turning Polysemantic Neurons Into Pure Features by Identifying Relevant Circuits"), ", 2024,"),
    ),
    h("p", {}, "To cite this software, see CITATION.cff in the source. Licence: Apache-2.0."),
  );
}
