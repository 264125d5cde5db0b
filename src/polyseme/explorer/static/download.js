// A neuron's examples as a JSON file, grouped as the page shows them.

import * as data from "./data.js";
import { h } from "./dom.js";
import { windowImportances } from "./importances.js";

/** A button that saves the examples; null if they can't be read. @param {import("./neuron-view.js").NeuronView} view */
export function downloadButton(view) {
  const { neuron } = view;
  if (!neuron.n || !neuron.examples.activation) return null;
  const save = () => {
    const url = URL.createObjectURL(new Blob([JSON.stringify(asJson(neuron, view.cut, view.groups), null, 1)], { type: "application/json" }));
    const name = `${neuron.run.title}-${neuron.site.name}-${neuron.neuron}.json`.replace(/[^\p{L}\p{N}._-]+/gu, "-");
    h("a", { href: url, download: name }).click();
    URL.revokeObjectURL(url);
  };
  return h("button", { type: "button", class: "download", title: "Save the examples as JSON, grouped as shown", onclick: save }, "Save examples");
}

function asJson(neuron, cut, groups) {
  const { run, site, examples, tokens } = neuron;
  const n = Array.from({ length: neuron.n }, (_, i) => i);
  return {
    run: run.title,
    site: site.name,
    neuron: neuron.neuron,
    threshold: cut.threshold,
    ...(groups && { overlap: groups.threshold }),
    metrics: Object.fromEntries(Object.entries(neuron.metrics).map(([name, value]) => [name, single(value)])),
    examples: n.map((example) => ({
      example,
      input: examples.inputNumber[example],
      position: examples.position[example],
      activation: single(examples.activation[example]),
      feature: cut.labels[example],
      ...(groups && { meaning: groups.labels[example] }),
      ...(examples.class && { class: examples.class[example], class_name: run.image?.class_names?.[examples.class[example]] ?? null }),
      ...(tokens?.window && windowAsJson(tokens, example, examples.activation[example])),
    })),
  };
}

/** The tokens around an example, without those beyond its context. */
function windowAsJson(tokens, example, activation) {
  const words = data.windowOf(tokens, example);
  const inside = words.map((word) => word !== null);
  const within = (values) => values && Array.from(values).filter((_, i) => inside[i]);
  const at = example * tokens.width;
  const shares = within(tokens.shares?.subarray(at, at + tokens.width));
  return {
    tokens: within(words),
    token: inside.slice(0, tokens.before).filter(Boolean).length, // index of the example's own token
    activations: shares?.map((share) => single(share * activation)) ?? null,
    importances: within(windowImportances(tokens, example))?.map((share) => single(share)) ?? null,
  };
}

/** A single-precision number with enough digits to identify it; null if not finite. */
function single(value) {
  return Number.isFinite(value) ? Number(value.toPrecision(9)) : null;
}
