// A run as a whole: what was analysed, its neurons by layer and by metric, a map and a table of all of them.

import * as data from "../data.js";
import { stackedRows } from "../charts.js";
import { h } from "../dom.js";
import { damageNotice, factList } from "../facts.js";
import { whole, percent, value } from "../format.js";
import { siteName } from "../lookup.js";
import { metricNames, metric } from "../metrics.js";
import { neuronMap } from "../neuron-map.js";
import { neuronTable } from "../neuron-table.js";
import { metricDistribution } from "../metric-distribution.js";
import { quantile } from "../scale.js";
import { readSelection, select, selectionControls, rangeText } from "../selection.js";

export async function render(main, ctx) {
  const { run } = ctx;
  const table = await data.neurons(run);
  const names = metricNames(table.names);
  const layers = h("div");
  const distribution = h("section", { class: "card" });
  const controls = h("div");
  const map = h("section", { class: "card" });
  const rows = h("section", { class: "card" });

  main.append(
    h("header", { class: "run-head" }, h("h1", {}, h("bdi", {}, run.title)), factList(run)),
    damageNotice(run) ?? "",
    stats(table),
    h(
      "div",
      { class: "grid" },
      h("section", { class: "card" }, h("header", {}, h("h2", {}, run.sites.length > 1 ? "Features by layer" : "Neurons by number of features")), layers),
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
    // The same selection is the same object, so that a view sees that it has nothing to do.
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

/** Height of the chart that stands beside that of the layers, where there's room for both. */
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
    unlisted.length && ["Without examples", share(unlisted.length), "Active, but none of their inputs was selected."],
    median("n_clusters"),
    median("mean_distance"),
    median("calibrated_distance"),
    median(table.has("token_density") ? "token_density" : "density"),
  ].filter(Boolean);
  return h("dl", { class: "stats" }, tiles.map(([name, words, says]) => h("div", { title: says }, h("dt", {}, name), h("dd", {}, words))));
}

/** How many neurons of each layer have how many features, in powers of two. */
function layerChart(element, run, table, change, signal) {
  const [clusters, density] = [table.column("n_clusters"), table.column("density")];
  const most = clusters.reduce((a, b) => Math.max(a, b), 0);
  const least = density.reduce((a, b) => (b > 0 && b < a ? b : a), 1);
  const kinds = [
    { label: "dead", pick: { density: "..0" }, paint: "--feature-rest" },
    { label: "without examples", pick: { n_examples: "..0", density: rangeText(least / 2, Infinity) }, paint: "--mark-soft" },
  ];
  for (let lo = 1, step = 0; lo <= Math.max(1, most); lo *= 2, step++) {
    const last = step === 6; // there are seven steps of colour
    const hi = last ? Infinity : 2 * lo - 1;
    kinds.push({ label: last ? `${lo} or more` : lo === hi ? "1 feature" : `${lo}–${hi}`, pick: { n_clusters: rangeText(lo, hi) }, paint: `--scale-${step}` });
    if (last) break;
  }
  const counts = run.sites.map(({ first, n_neurons }) => {
    const row = kinds.map(() => 0);
    for (let i = first; i < first + n_neurons; i++) {
      // Features 1, 2-3, 4-7, ... are kinds 2, 3, 4, ...
      row[clusters[i] ? Math.min(kinds.length - 1, 33 - Math.clz32(clusters[i])) : Number(density[i] > 0)] += 1;
    }
    return row;
  });
  const present = kinds.map((_, k) => k).filter((k) => counts.some((row) => row[k]));
  stackedRows(
    element,
    {
      title: `Neurons of each layer by their number of features, ${run.sites.length} layers`,
      rowName: "Layer",
      rows: run.sites.map((site, s) => ({
        label: siteName(run, site),
        counts: present.map((k) => counts[s][k]),
        total: site.n_neurons,
      })),
      kinds: present.map((k) => kinds[k]),
      onPick(r, k) {
        const { pick } = kinds[present[k]];
        change({ layer: run.sites.length > 1 ? run.sites[r].address : null, n_clusters: null, n_examples: null, density: null, ...pick });
      },
    },
    signal,
  );
}
