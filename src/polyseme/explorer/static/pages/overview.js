// The overview of a run: what was analysed, its neurons by layer and by metric, a map and a table of all neurons.

import * as data from "../data.js";
import { stackedRows } from "../charts.js";
import { h } from "../dom.js";
import { damageNotice, factList } from "../facts.js";
import { count, whole, percent, value } from "../format.js";
import { siteName } from "../lookup.js";
import { tooFewVectors } from "../meanings.js";
import { metricNames, metric } from "../metrics.js";
import { neuronMap } from "../neuron-map.js";
import { neuronTable } from "../neuron-table.js";
import { metricDistribution } from "../metric-distribution.js";
import { quantile } from "../scale.js";
import { readSelection, select, selectionControls, rangeText } from "../selection.js";

const SITES_NAMED = 3;
const N_STEPS = 7; // colours in the design's scale

export async function render(main, ctx) {
  const { run } = ctx;
  const table = await data.neurons(run);
  const names = metricNames(table.names);
  const counted = table.has("n_meanings") ? "Meanings" : "Features";
  const layers = h("div");
  const distribution = h("section", { class: "card" });
  const controls = h("div");
  const map = h("section", { class: "card" });
  const rows = h("section", { class: "card" });

  main.append(
    h("header", { class: "run-head" }, h("h1", {}, h("bdi", {}, run.title)), factList(run)),
    damageNotice(run) ?? "",
    tooFewNotice(run) ?? "",
    stats(table),
    h(
      "div",
      { class: "grid" },
      h("section", { class: "card" }, h("header", {}, h("h2", {}, run.sites.length > 1 ? `${counted} by layer` : `Neurons by number of ${counted.toLowerCase()}`)), layers),
      distribution,
    ),
    h("section", { class: "select-bar", "aria-label": "Selection of neurons" }, controls),
    h("div", { class: "map-and-table" }, map, rows),
  );

  const change = (changes) => ctx.navigate(changes);
  const bar = selectionControls(controls, run, names, change);
  const views = [
    metricDistribution(distribution, { run, table, names, change, height: beside(run) }, ctx.signal),
    neuronMap(map, { run, table, names, change }, ctx.signal),
    neuronTable(rows, { run, table, names, change }, ctx.signal),
  ];
  layerChart(layers, run, table, change, ctx.signal);

  let selected = { key: null };
  function update(query) {
    const selection = readSelection(run, names, query);
    const key = JSON.stringify([selection.layer, selection.ranges.map(({ name, lo, hi }) => [name, String(lo), String(hi)])]);
    // The same selection stays the same object, so that views can skip the update.
    if (key !== selected.key) {
      const { keep, n } = select(run, table, selection);
      selected = { key, keep: n < table.n ? keep : null, n };
    }
    bar.show(selection, selected.n);
    for (const view of views) view.show(query, selected.keep);
  }
  update(ctx.query);
  return { update };
}

/** Height of the chart next to the layers' chart, if there is room for both. */
function beside(run) {
  return window.innerWidth < 980 ? 210 : Math.max(210, Math.min(420, 15 * run.sites.length));
}

function stats(table) {
  const [examples, density] = [table.column("n_examples"), table.column("density")];
  const [alive, unlisted] = [[], []]; // with examples; active, but without
  let dead = 0;
  for (let i = 0; i < table.n; i++) {
    if (examples[i] > 0) alive.push(i);
    else if (density[i] === 0) dead += 1;
    else unlisted.push(i);
  }
  const median = (name) => {
    if (!table.has(name)) return null;
    const column = table.column(name);
    const { label, kind, reading } = metric(name);
    return [`${label}, median`, value(quantile(alive.map((i) => column[i]), 0.5), kind), reading];
  };
  const share = (n) => [whole(n), " ", h("small", {}, percent(n / Math.max(1, table.n)))];
  const tiles = [
    ["Neurons", whole(table.n)],
    ["Dead", share(dead), "No input activates them."],
    unlisted.length && ["Without examples", share(unlisted.length), "Active, but no input that activates them was selected."],
    median("n_meanings"),
    median("n_clusters"),
    median("mean_distance"),
    median("calibrated_distance"),
    median(table.has("token_density") ? "token_density" : "density"),
  ].filter(Boolean);
  return h("dl", { class: "stats" }, tiles.map(([name, words, says]) => h("div", { title: says }, h("dt", {}, name), h("dd", {}, words))));
}

/** A warning about sites with too few vectors to count meanings, or null. */
function tooFewNotice(run) {
  const found = run.has?.meanings ? run.sites.map((site) => [site, tooFewVectors(site)]).filter(([, words]) => words) : [];
  if (!found.length) return null;
  const rest = found.length - SITES_NAMED;
  return h("section", { class: "notice", "aria-label": "Too few vectors" }, run.sites.length === 1
    ? h("p", {}, found[0][1])
    : h("ul", {}, found.slice(0, SITES_NAMED).map(([site, words]) => h("li", {}, h("bdi", {}, siteName(run, site)), `: ${words}`)),
      rest > 0 && h("li", {}, `The same applies to ${count(rest, "more layer")}.`)));
}

/** Ranges of numbers, one per colour: [from, to, in words]. */
function steps(name, most) {
  const all = name === "n_meanings"
    ? Array.from({ length: N_STEPS }, (_, i) => [i + 1, i + 1, i ? String(i + 1) : "1 meaning"])
    : Array.from({ length: N_STEPS }, (_, i) => [2 ** i, 2 ** (i + 1) - 1, i ? `${2 ** i}–${2 ** (i + 1) - 1}` : "1 feature"]);
  const [last] = all.at(-1);
  all[N_STEPS - 1] = [last, Infinity, `${last} or more`];
  return all.filter(([lo], i) => i === 0 || lo <= most);
}

/** Neurons of each layer by number of meanings or, in a run without meanings, of features in powers of two. */
function layerChart(element, run, table, change, signal) {
  const name = table.has("n_meanings") ? "n_meanings" : "n_clusters";
  const words = name === "n_meanings" ? "meanings" : "features";
  const [numbers, density] = [table.column(name), table.column("density")];
  const most = numbers.reduce((a, b) => Math.max(a, b), 0);
  const least = density.reduce((a, b) => (b > 0 && b < a ? b : a), 1);
  const kinds = [
    { label: "dead", pick: { density: "..0" }, paint: "--feature-rest" },
    { label: "without examples", pick: { n_examples: "..0", density: rangeText(least / 2, Infinity) }, paint: "--mark-soft" },
  ];
  steps(name, most).forEach(([lo, hi, label], step) => kinds.push({ label, lo, hi, pick: { [name]: rangeText(lo, hi) }, paint: `--scale-${step}` }));
  const counts = run.sites.map(({ first, n_neurons }) => {
    const row = kinds.map(() => 0);
    for (let i = first; i < first + n_neurons; i++) {
      const kind = kinds.findIndex(({ lo, hi }) => numbers[i] >= lo && numbers[i] <= hi);
      row[kind >= 0 ? kind : Number(density[i] > 0)] += 1;
    }
    return row;
  });
  const present = kinds.map((_, k) => k).filter((k) => counts.some((row) => row[k]));
  stackedRows(
    element,
    {
      title: `Neurons of each layer by their number of ${words}, ${run.sites.length} layers`,
      rowName: "Layer",
      rows: run.sites.map((site, s) => ({
        label: siteName(run, site),
        counts: present.map((k) => counts[s][k]),
        total: site.n_neurons,
      })),
      kinds: present.map((k) => kinds[k]),
      onPick(r, k) {
        const { pick } = kinds[present[k]];
        change({ layer: run.sites.length > 1 ? run.sites[r].address : null, [name]: null, n_examples: null, density: null, ...pick });
      },
    },
    signal,
  );
}
