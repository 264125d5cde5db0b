// Compares runs: metrics, distributions, and neurons of two runs paired by their directions.

import * as data from "../data.js";
import { distribution, swatch } from "../charts.js";
import { h, replace } from "../dom.js";
import { count, isolated, number, value, whole } from "../format.js";
import { Grid } from "../grid.js";
import { neuronName } from "../lookup.js";
import { metric, metricNames } from "../metrics.js";
import { pairPreview } from "../pair-preview.js";
import { address, neuronAddress } from "../route.js";
import { binCounts, binEdges, extent, logarithmic, quantile } from "../scale.js";

/** One colour per run; the first two are the design's pair for comparisons. */
const PAINTS = ["--mark-a", "--mark-b", "--feature-2", "--feature-3", "--feature-4", "--feature-5"];

export async function render(main, ctx) {
  const comparison = await data.comparison();
  if (!comparison) throw new data.DataError("There’s only one run here, so there is nothing to compare. Give two: polyseme explore RUN RUN");
  const runs = await Promise.all(ctx.runs.map((_, index) => data.run(index)));
  const tables = await Promise.all(runs.map((run) => data.neurons(run)));
  const chart = h("section", { class: "card" });
  const pairs = h("section", { class: "card" });
  main.append(
    h("header", { class: "run-head" }, h("h1", {}, runs.map(({ title }, i) => [i > 0 && " and ", h("bdi", {}, title)])), names(runs), unlike(comparison)),
    h("div", { class: "compare-top" }, figures(runs, comparison), h("div", {}, chart, meaning(runs, comparison))),
    pairs,
  );
  const views = [distributions(chart, runs, tables, ctx), await pairList(pairs, runs, tables, ctx)];
  const update = (query) => views.forEach((view) => view?.show(query));
  update(ctx.query);
  return { update };
}

function names(runs) {
  return h(
    "ul",
    { class: "legend" },
    runs.map((run, i) =>
      h("li", {}, swatch(PAINTS[i]), h("a", { href: address("overview", [], { run: run.index }) }, h("bdi", {}, run.title)), count(run.n_neurons, "neuron")),
    ),
  );
}

/** A notice of what the runs differ in besides their neurons. */
function unlike({ unlike: parts }) {
  if (!parts.length) return null;
  const words = [parts.slice(0, -1).join(", "), parts.at(-1)].filter(Boolean).join(" and ");
  return h("p", { class: "notice" }, `These runs also differ in ${words}, which alone may change the metrics.`);
}

// ----------------------------------------------------------------------------------- figures

function figures(runs, { rows }) {
  const groups = [...new Set(rows.map(({ group }) => group))];
  const both = runs.length === 2;
  return h(
    "section",
    { class: "card" },
    h("header", {}, h("h2", {}, "Metrics")),
    h(
      "div",
      { class: "scroll-x", tabindex: 0, role: "region", "aria-label": "Table of metrics" },
      h(
        "table",
        { class: "plain compare" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col" }, "Metric"),
            runs.map((run, i) => h("th", { scope: "col", class: "num" }, swatch(PAINTS[i]), " ", h("bdi", {}, run.title))),
            both && h("th", { scope: "col", class: "num difference" }, "Difference"),
          ),
        ),
        groups.map((group) =>
          h(
            "tbody",
            {},
            h("tr", { class: "group" }, h("th", { scope: "rowgroup", colspan: runs.length + 1 + both }, sentenceCase(group))),
            rows.filter((row) => row.group === group).map((row) => figureRow(row, runs, both)),
          ),
        ),
      ),
    ),
  );
}

function figureRow({ name, values, counts, kind, digits, reading }, runs, both) {
  const write = (v) => written(v, kind, digits);
  const over = (i) => {
    const n = counts?.[i];
    const all = n === undefined || n === null || n === runs[i].n_neurons;
    return all ? null : h("small", { class: "quiet-text" }, `of ${whole(n)}`);
  };
  return h(
    "tr",
    {},
    h("th", { scope: "row" }, h("span", {}, sentenceCase(name)), reading && h("small", { class: "said quiet-text" }, reading)),
    values.map((v, i) => h("td", { class: "num" }, v === null ? "–" : write(v), over(i))),
    both && h("td", { class: "num difference" }, values.includes(null) ? "–" : difference(values[1] - values[0], kind, digits)),
  );
}

const minus = (text) => text.replace("-", "−");

function written(v, kind, digits) {
  switch (kind) {
    case "integer":
      return whole(v);
    case "percent":
      return `${minus((100 * v).toFixed(digits))}%`;
    default:
      return (kind === "signed" && v > 0 ? "+" : "") + minus(v.toFixed(digits));
  }
}

/** The difference with its sign; for shares in points, because "+3%" would read as a ratio. */
function difference(v, kind, digits) {
  const sign = v > 0 ? "+" : "";
  if (kind === "percent") return `${sign}${minus((100 * v).toFixed(digits))} points`;
  return sign + written(v, kind === "signed" ? "number" : kind, digits);
}

function sentenceCase(words) {
  return words.replace(/^./, (c) => c.toUpperCase());
}

function meaning(runs, { rows }) {
  const unmeasured = runs.some(({ sites }) => sites.some(({ kind }) => kind === "sae")) && !rows.some(({ key }) => key === "fvu");
  return h(
    "section",
    { class: "card" },
    h("header", {}, h("h2", {}, "How to read it")),
    h("p", {}, h("strong", {}, "Smaller distances alone prove nothing."), " If a neuron’s weights lie on few inputs, any examples look alike: check the participation ratio and the calibrated distance."),
    h("p", {}, h("strong", {}, "A gain has a cost."), " Check how many neurons are dead, how many are active, and how good the reconstruction is.",
      unmeasured && [" These runs don’t record the reconstruction; runs made by ", h("code", {}, "polyseme compare"), " do."]),
    h("p", {}, h("strong", {}, "Each mean covers only the neurons that have a value."), " These differ between the runs. If a mean doesn’t cover all neurons, their number is below it."),
  );
}

// ----------------------------------------------------------------------------- distributions

function distributions(element, runs, tables, ctx) {
  const shared = metricNames(tables[0].names).filter((name) => tables.every((table) => table.has(name)));
  const choice = h(
    "select",
    { "aria-label": "Metric", onchange: () => ctx.navigate({ metric: choice.value }) },
    shared.map((name) => h("option", { value: name }, metric(name).label)),
  );
  const reading = h("p", { class: "reading" });
  const box = h("div");
  const key = h("ul", { class: "legend" }, runs.map((run, i) => h("li", {}, swatch(PAINTS[i]), h("bdi", {}, run.title))));
  replace(element, h("header", {}, h("h2", {}, "Distributions"), choice), reading, key, box);
  let controller = new AbortController();
  ctx.signal.addEventListener("abort", () => controller.abort());
  let shown = "";
  return {
    show(query) {
      const name = shared.includes(query.get("metric")) ? query.get("metric") : shared.includes("mean_distance") ? "mean_distance" : shared[0];
      if (name === shown) return;
      shown = name;
      choice.value = name;
      const { label, kind, log: wanted, reading: words } = metric(name);
      const columns = tables.map((table) => table.column(name));
      const both = columns.flatMap((column) => Array.from(column));
      const log = logarithmic(both, wanted);
      const range = extent(both, log);
      replace(reading, words, " Heights are shares of each run’s own neurons; dashed lines are medians.");
      controller.abort();
      controller = new AbortController();
      if (!range) return replace(box, h("p", { class: "quiet-text" }, "No neuron has a value."));
      const edges = binEdges(...range, { log, integer: kind === "integer", n: 48 });
      const medians = columns.map((column) => quantile(column, 0.5));
      distribution(
        box,
        {
          title: `Distributions of ${label}: ${runs.map(({ title }, i) => `median ${value(medians[i], kind)} in ${title}`).join(", ")}`,
          axis: log ? `${label} (logarithmic)` : label,
          edges,
          log,
          shares: true,
          height: 300,
          percent: kind === "share",
          text: (v) => (kind === "integer" ? number(Math.ceil(v)) : value(v, kind)),
          series: columns.map((column, i) => ({ label: runs[i].title, counts: binCounts(column, edges, { log }), paint: PAINTS[i] })),
          marks: medians.map((at, i) => ({ at, label: "", paint: PAINTS[i] })),
        },
        controller.signal,
      );
    },
  };
}

// ------------------------------------------------------------------------------------- pairs

async function pairList(element, runs, tables, ctx) {
  const header = h("header", {}, h("h2", {}, "Paired neurons"));
  let pairs;
  try {
    pairs = await data.pairs();
  } catch (error) {
    replace(element, header, h("p", { class: "notice bad" }, error.message));
    return null;
  }
  if (pairs.reason) {
    replace(element, header, h("p", { class: "notice" }, pairs.reason));
    return null;
  }
  const way = pairs.by === "decoder" ? "decoder direction" : "weight vector";
  const rows = Array.from(pairs.row, (_, row) => row).filter((row) => pairs.row[row] >= 0);
  const features = tables.map((table) => table.column("n_clusters"));
  const distances = tables.map((table) => table.column("mean_distance"));
  const change = (row) => distances[1][pairs.row[row]] - distances[0][row];
  const columns = [
    { name: "neuron", label: isolated(runs[0].title), cell: (row) => choose(row), of: (row) => row },
    { name: "match", label: isolated(runs[1].title), cell: (row) => rowName(runs[1], pairs.row[row]), of: (row) => pairs.row[row] },
    { name: "similarity", label: "Similarity", num: true, hint: `Cosine of the ${way}s`, cell: (row) => number(pairs.similarity[row]), of: (row) => pairs.similarity[row] },
    { name: "features", label: "Features", num: true, cell: (row) => `${whole(features[0][row])} → ${whole(features[1][pairs.row[row]])}`, of: (row) => features[1][pairs.row[row]] - features[0][row] },
    { name: "distance", label: "Mean distance", num: true, cell: (row) => `${value(distances[0][row], "distance")} → ${value(distances[1][pairs.row[row]], "distance")}`, of: change },
    { name: "change", label: "Change", num: true, cell: (row) => value(change(row), "distance"), of: change },
  ];
  const list = h("div");
  const preview = h("div");
  replace(
    element,
    header,
    h("p", { class: "reading" }, `Each neuron of ${isolated(runs[0].title)}, with the neuron of ${isolated(runs[1].title)} whose ${way} is most similar, by cosine: 1 is the same direction. Several neurons may have the same match.`),
    h("div", { class: "pairs" }, list, preview),
  );
  let order = rows;
  let sort = "-similarity";
  const grid = new Grid(
    list,
    {
      label: "Pairs of neurons",
      columns,
      empty: "No neuron has a match.",
      onSort: (name) => ctx.navigate({ sort: sort === `-${name}` ? name : `-${name}`, pair: null }),
    },
    ctx.signal,
  );

  function choose(row) {
    return h(
      "a",
      {
        href: neuronAddress(runs[0], ...place(runs[0], row)),
        onclick: (event) => {
          if (event.ctrlKey || event.metaKey || event.shiftKey) return;
          event.preventDefault(); // the pair is shown next to the list, with links to its neurons' pages
          ctx.navigate({ pair: row });
        },
      },
      rowName(runs[0], row),
    );
  }

  return {
    show(query) {
      const asked = query.get("sort") ?? "-similarity";
      const column = columns.find(({ name }) => name === asked.replace(/^-/, ""));
      sort = column ? asked : "-similarity";
      order = sorted(rows, (column ?? columns[2]).of, sort.startsWith("-"));
      grid.show(order, sort);
      const given = query.get("pair");
      const row = given !== null && rows.includes(Number(given)) ? Number(given) : order[0];
      grid.mark(row);
      if (row === undefined) return;
      const at = order.indexOf(row);
      pairPreview(preview, {
        runs,
        rows: [row, pairs.row[row]],
        similarity: pairs.similarity[row],
        paints: PAINTS,
        step: (by) => order[at + by] !== undefined && ctx.navigate({ pair: order[at + by] }),
        first: at === 0,
        last: at === order.length - 1,
      });
    },
  };
}

function place(run, row) {
  const { site, neuron } = data.neuronOf(run, row);
  return [site.number, neuron];
}

function rowName(run, row) {
  const { site, neuron } = data.neuronOf(run, row);
  return neuronName(run, site, neuron);
}

function sorted(rows, of, down) {
  return [...rows].sort((a, b) => {
    const [u, v] = [of(a), of(b)];
    if (Number.isNaN(u) || Number.isNaN(v)) return Number.isNaN(u) - Number.isNaN(v) || a - b;
    return (down ? v - u : u - v) || a - b;
  });
}
