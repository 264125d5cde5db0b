// The distribution of one metric over a run's neurons, with the selected ones in front.

import { distribution } from "./charts.js";
import { h, replace } from "./dom.js";
import { number, value, whole } from "./format.js";
import { metric } from "./metrics.js";
import { binCounts, binEdges, extent, logarithmic, quantile } from "./scale.js";
import { rangeText } from "./selection.js";

export function metricDistribution(element, { table, names, change, height }, signal) {
  const choice = h(
    "select",
    { "aria-label": "Metric", onchange: () => change({ metric: choice.value }) },
    names.map((name) => h("option", { value: name }, metric(name).label)),
  );
  const reading = h("p", { class: "reading" });
  const chart = h("div");
  replace(element, h("header", {}, h("h2", {}, "Distribution"), choice), reading, chart);
  let shown = null;
  let controller = new AbortController();
  signal.addEventListener("abort", () => controller.abort());

  return {
    show(query, keep) {
      const asked = query.get("metric");
      const name = [asked, "n_meanings", "mean_distance"].find((one) => names.includes(one)) ?? names[0];
      if (shown && shown[0] === name && shown[1] === keep) return;
      shown = [name, keep];
      choice.value = name;
      const { label, reading: words, kind, log: wanted } = metric(name);
      const values = table.column(name);
      const log = logarithmic(values, wanted);
      const range = extent(values, log);
      const missing = values.length - countFinite(values, log);
      replace(reading, words, missing ? ` ${whole(missing)} of ${whole(values.length)} neurons ${missing === 1 ? "has" : "have"} no value${log ? ", or 0," : ""} and ${missing === 1 ? "is" : "are"} left out.` : "");
      controller.abort();
      controller = new AbortController();
      if (!range) return replace(chart, h("p", { class: "quiet-text" }, "No neuron has a value."));
      const integer = kind === "integer";
      // For few neurons, use fewer bins than would fit: one neuron per bin is not a distribution.
      const n = Math.max(8, Math.min(48, Math.ceil(2 * Math.sqrt(values.length))));
      const edges = binEdges(...range, { log, integer, n });
      const series = [{ label: "all neurons", counts: binCounts(values, edges, { log }), paint: keep ? "--mark-soft" : "--mark" }];
      if (keep) series.push({ label: "selected", counts: binCounts(values, edges, { log, keep }), paint: "--mark" });
      const chosen = keep ? Array.from(values).filter((_, i) => keep[i]) : values;
      const middle = quantile(chosen, 0.5);
      distribution(
        chart,
        {
          title: `Distribution of ${label} over ${keep ? "the selected" : "all"} neurons: median ${value(middle, kind)}, from ${value(range[0], kind)} to ${value(range[1], kind)}`,
          axis: log ? `${label} (logarithmic)` : label,
          edges,
          series,
          log,
          height,
          percent: kind === "share",
          text: (v) => (integer ? number(Math.ceil(v)) : value(v, kind)),
          marks: [{ at: middle, label: `median ${value(middle, kind)}` }],
          onPick: (lo, hi) => change({ [name]: integer ? rangeText(Math.ceil(lo), Math.floor(hi)) : rangeText(lo, hi) }),
        },
        controller.signal,
      );
    },
  };
}

function countFinite(values, log) {
  let n = 0;
  for (let i = 0; i < values.length; i++) n += Number.isFinite(values[i]) && (!log || values[i] > 0);
  return n;
}
