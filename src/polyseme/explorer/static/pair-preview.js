// Two neurons side by side, in brief: their largest features and a few examples of each.

import * as data from "./data.js";
import { swatch } from "./charts.js";
import { h, replace } from "./dom.js";
import { count, isolated, number, percent, value } from "./format.js";
import { siteName } from "./lookup.js";
import { badge, paletteOf } from "./palette.js";
import { neuronAddress } from "./route.js";
import { textSample } from "./windows.js";

const FEATURES = 5;
const THUMBS = 12;
const LINES = 3;

let latest = null;

/** Fills `element` with the pair; a later call replaces one that is still loading. */
export async function pairPreview(element, pair) {
  const mine = {};
  latest = mine;
  const { runs, rows, similarity, step, first, last } = pair;
  let neurons;
  try {
    neurons = await Promise.all(rows.map((row, i) => data.neuron(runs[i], row)));
  } catch (error) {
    if (latest === mine) replace(element, h("p", { class: "notice bad" }, error.message));
    return;
  }
  if (latest !== mine) return;
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.step : null;
  const move = (name, by, off) =>
    h("button", { type: "button", disabled: off, dataset: { step: by }, onclick: () => step(by) }, name);
  replace(
    element,
    h(
      "div",
      { class: "pair-steps" },
      move("← Previous", -1, first),
      h("span", { role: "status" }, `Similarity ${number(similarity)}`),
      move("Next →", 1, last),
    ),
    h("div", { class: "pair" }, neurons.map((neuron, i) => brief(neuron, pair.paints[i]))),
  );
  if (focused) element.querySelector(`[data-step="${focused}"]`)?.focus();
}

function brief(neuron, paint) {
  const { run, site } = neuron;
  const { mean_distance: distance, density, token_density: ofTokens } = neuron.metrics;
  return h(
    "article",
    { class: "brief" },
    h(
      "h3",
      {},
      swatch(paint),
      " ",
      h("a", { href: neuronAddress(run, site.number, neuron.neuron) }, `${isolated(run.title)}: ${siteName(run, site)} / ${neuron.neuron}`),
    ),
    h(
      "p",
      { class: "small quiet-text" },
      neuron.n
        ? `${count(neuron.nFeatures, "feature")} of ${count(neuron.n, "example")} · mean distance ${value(distance, "distance")} · ${ofTokens === undefined ? "density" : "token density"} ${percent(ofTokens ?? density)}`
        : density > 0 ? "No examples: no input that activates it was selected." : "Dead: no input activates it.",
    ),
    largest(neuron).map(({ feature, members }) => featureRow(neuron, feature, members)),
  );
}

/** The largest features at the run's own cut, each with its strongest examples first. */
function largest({ n, examples }) {
  if (!examples.feature) return []; // damaged
  const groups = new Map();
  for (let e = 0; e < n; e++) {
    const feature = examples.feature[e];
    if (!groups.has(feature)) groups.set(feature, []);
    groups.get(feature).push(e);
  }
  return [...groups]
    .map(([feature, members]) => ({ feature, members: members.sort((a, b) => examples.activation[b] - examples.activation[a]) }))
    .sort((a, b) => a.feature - b.feature)
    .slice(0, FEATURES);
}

function featureRow(neuron, feature, members) {
  const label = neuron.labels[feature];
  return h(
    "div",
    { class: "brief-feature" },
    h("div", { class: "brief-name" }, badge(feature, paletteOf(feature, members.length)), h("span", { class: "quiet-text small" }, count(members.length, "example")), label && h("bdi", { class: "small" }, label)),
    neuron.thumbs && neuron.examples.thumb ? thumbRow(neuron, feature, members) : null,
    neuron.tokens && h("ul", { class: "brief-lines" }, members.slice(0, LINES).map((e) => h("li", {}, sample(neuron, e)))),
  );
}

function sample({ tokens }, e) {
  return textSample(data.windowOf(tokens, e), tokens.before, { shares: tokens.shares?.subarray(e * tokens.width, (e + 1) * tokens.width) ?? null });
}

/** The strongest examples of a feature in one picture, side by side. */
function thumbRow({ thumbs, examples }, feature, members) {
  const [height, width, channels] = thumbs.shape;
  const shown = members.slice(0, THUMBS);
  const gap = 2;
  const canvas = h("canvas", {
    class: "brief-thumbs",
    width: shown.length * (width + gap) - gap,
    height,
    role: "img",
    "aria-label": `The ${count(shown.length, "strongest example")} of feature ${feature}`,
  });
  canvas.style.setProperty("--ratio", `${(shown.length * (width + gap) - gap) / height}`);
  const g = canvas.getContext("2d");
  shown.forEach((e, i) => {
    const pixels = thumbs.of(examples.thumb[e]);
    const image = g.createImageData(width, height);
    for (let p = 0; p < width * height; p++) {
      for (let c = 0; c < 3; c++) image.data[4 * p + c] = pixels[p * channels + (channels === 1 ? 0 : c)];
      image.data[4 * p + 3] = 255;
    }
    g.putImageData(image, i * (width + gap), 0);
  });
  return canvas;
}
