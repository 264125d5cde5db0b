// All neurons of a run as points, by any two metrics, coloured by a third or by layer.

import * as data from "./data.js";
import { swatch } from "./charts.js";
import { h, replace, colourParts } from "./dom.js";
import { value, whole } from "./format.js";
import { siteName } from "./lookup.js";
import { metric } from "./metrics.js";
import { neuronAddress } from "./route.js";
import { Scale, extent, logarithmic, quantile } from "./scale.js";
import { Scatter } from "./scatter.js";

const STEPS = 64;
// Both are mean distances between the same neuron’s embeddings, so the line where they are equal is meaningful.
const COMPARED = ["mean_distance", "background_distance"];
const HUES = 8; // categorical colours in the design; more layers use a sequential scale

export function neuronMap(element, { run, table, names, change }, signal) {
  const pick = (parameter, label, options) => {
    const select = h("select", { onchange: () => change({ [parameter]: select.value }) }, options);
    return { select, field: h("label", { class: "field" }, label, select) };
  };
  const options = () => names.map((name) => h("option", { value: name }, metric(name).label));
  const x = pick("x", "X axis", options());
  const y = pick("y", "Y axis", options());
  const shade = pick("colour", "Colour", [run.sites.length > 1 && h("option", { value: "layer" }, "Layer"), options()]);
  const key = h("div");
  const note = h("p", { class: "reading" });
  const canvas = h("div");
  replace(
    element,
    h("header", { class: "many" }, h("h2", {}, "Map of all neurons"), x.field, y.field, shade.field),
    note,
    canvas,
  );
  const scatter = new Scatter(
    canvas,
    {
      label: "Map of all neurons as points. Arrow keys pan, plus and minus zoom, 0 shows all. The table of neurons has the same values.",
      height: (width) => Math.round(Math.min(560, Math.max(300, width * 0.62))),
      tip: (row) => tipOf(row),
      onPick(row) {
        const { site, neuron } = data.neuronOf(run, row);
        location.hash = neuronAddress(run, site.number, neuron);
      },
    },
    signal,
  );
  element.append(h("div", { class: "map-key" }, key, scatter.buttons));
  let shown = null;
  window.addEventListener("themechange", () => shown && draw(...shown), { signal });

  function tipOf(row) {
    const { site, neuron } = data.neuronOf(run, row);
    const said = [...new Set([x.select.value, y.select.value, shade.select.value])].filter((name) => name !== "layer");
    return [
      h("strong", {}, `${siteName(run, site)} / ${neuron}`),
      ...said.map((name) => h("div", {}, `${metric(name).label}: ${value(table.column(name)[row], metric(name).kind)}`)),
    ];
  }

  function axis(name) {
    const values = table.column(name);
    const { label, log: wanted, kind } = metric(name);
    const log = logarithmic(values, wanted);
    const [lo, hi] = extent(values, log) ?? [0, 1];
    return { values, lo, hi, log, label: log ? `${label} (logarithmic)` : label, percent: kind === "share" };
  }

  function draw(names, keep) {
    const [across, up] = [axis(names.x), axis(names.y)];
    const distances = names.x !== names.y && [names.x, names.y].every((name) => COMPARED.includes(name));
    if (distances) {
      for (const one of [across, up]) [one.lo, one.hi] = [Math.min(across.lo, up.lo), Math.max(across.hi, up.hi)];
    }
    const { shade: shades, paints, legend } = names.colour === "layer" ? byLayer(run, table) : byMetric(table, names.colour);
    replace(key, legend);
    replace(
      note,
      distances
        ? `${names.y === "mean_distance" ? "Below" : "Above"} the dashed line, a neuron’s examples are closer together than random inputs.`
        : `${metric(names.y).label}: ${metric(names.y).reading}`,
    );
    const unplaced = countUnplaced(across, up);
    if (unplaced) note.append(` ${whole(unplaced)} of ${whole(table.n)} neurons ${unplaced === 1 ? "has" : "have"} no value here.`);
    scatter.show({ x: across, y: up, shade: shades, paints, keep, diagonal: distances });
  }

  return {
    show(query, keep) {
      const known = (parameter, fallbacks) => [query.get(parameter), ...fallbacks].find((name) => names.includes(name) || (parameter === "colour" && name === "layer" && run.sites.length > 1));
      const chosen = {
        x: known("x", ["background_distance", "token_density", "density", names[0]]),
        y: known("y", ["mean_distance", names[0]]),
        colour: known("colour", ["layer", "n_clusters", names[0]]),
      };
      if (shown && shown[1] === keep && Object.keys(chosen).every((part) => chosen[part] === shown[0][part])) return;
      x.select.value = chosen.x;
      y.select.value = chosen.y;
      shade.select.value = chosen.colour;
      shown = [chosen, keep];
      draw(chosen, keep);
    },
  };
}

function countUnplaced(x, y) {
  const placed = ({ values, log }, i) => Number.isFinite(values[i]) && (!log || values[i] > 0);
  let n = 0;
  for (let i = 0; i < x.values.length; i++) n += !(placed(x, i) && placed(y, i));
  return n;
}

function byLayer(run, table) {
  const shade = new Uint8Array(table.n);
  const few = run.sites.length <= HUES;
  const paints = few ? run.sites.map((_, s) => colourParts(`--feature-${s}`)) : sequence(Math.min(255, run.sites.length));
  run.sites.forEach(({ first, n_neurons }, s) => {
    const step = few ? s : Math.round((s / (run.sites.length - 1)) * (paints.length - 1));
    shade.fill(step, first, first + n_neurons);
  });
  const [from, to] = [run.sites[0], run.sites.at(-1)];
  const legend = few
    ? h("ul", { class: "legend" }, run.sites.map((site, s) => h("li", {}, swatch(`--feature-${s}`), siteName(run, site))))
    : ramp(siteName(run, from), siteName(run, to));
  return { shade, paints, legend };
}

/** Colours from the 1st to the 99th percentile, so that outliers don't compress the scale. */
function byMetric(table, name) {
  const values = table.column(name);
  const { log: wanted, kind } = metric(name);
  const log = logarithmic(values, wanted);
  const usable = log ? Array.from(values).filter((v) => v > 0) : values;
  const [lo, hi] = [quantile(usable, 0.01), quantile(usable, 0.99)];
  const end = (v) => value(kind === "integer" ? Math.round(v) : v, kind);
  const shade = new Uint8Array(table.n);
  if (Number.isFinite(lo)) {
    const scale = new Scale(lo, hi, 1, STEPS, log);
    for (let i = 0; i < values.length; i++) {
      const v = log && values[i] <= 0 ? NaN : values[i];
      shade[i] = Number.isFinite(v) ? Math.max(1, Math.min(STEPS, Math.round(scale.at(v)))) : 0;
    }
  }
  return { shade, paints: [colourParts("--feature-rest"), ...sequence(STEPS)], legend: ramp(end(lo), end(hi)) };
}

/** `n` colours of the design's sequential scale. */
function sequence(n) {
  // The palest step is too faint for a point on the surface.
  const stops = [1, 2, 3, 4, 5, 6].map((i) => colourParts(`--scale-${i}`));
  return Array.from({ length: n }, (_, i) => {
    const at = n > 1 ? (i / (n - 1)) * (stops.length - 1) : 0;
    const low = Math.min(stops.length - 2, Math.floor(at));
    return stops[low].map((c, part) => c + (at - low) * (stops[low + 1][part] - c));
  });
}

function ramp(from, to) {
  return h("div", { class: "ramp" }, h("span", {}, from), h("span", { class: "ramp-bar", "aria-hidden": "true" }), h("span", {}, to));
}
