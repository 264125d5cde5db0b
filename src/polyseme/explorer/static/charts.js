// Charts of counts, as SVG: distributions and stacked bars. Each comes with an equivalent table.

import { h, svg, replace, redraw } from "./dom.js";
import { whole, percent } from "./format.js";
import { Scale, tickText } from "./scale.js";
import { showTip, hideTip } from "./tip.js";

/**
 * One or more distributions over the same bins, overlaid.
 *
 * @param {HTMLElement} element  filled, and redrawn when its width changes
 * @param {object} chart
 * @param {ArrayLike<number>} chart.edges  of the bins
 * @param {{label: string, counts: ArrayLike<number>, paint: string}[]} chart.series
 *   `paint` is a CSS variable. The first is drawn first.
 * @param {string} chart.title  description for screen readers
 * @param {string} chart.axis  label of the axis
 * @param {boolean} [chart.log]
 * @param {boolean} [chart.shares]  heights are shares of each series' own total: for series of different sizes
 * @param {(v: number) => string} chart.text  a value in words
 * @param {boolean} [chart.percent]  ticks as percentages
 * @param {{at: number, label: string, paint?: string}[]} [chart.marks]  values to mark, such as a median
 * @param {(lo: number, hi: number) => void} [chart.onPick]  a bin was clicked
 * @param {number} [chart.height]
 * @param {AbortSignal} signal
 */
export function distribution(element, chart, signal) {
  const figure = h("div", { class: "chart" });
  const table = distributionTable(chart);
  table.open = element.querySelector("details")?.open ?? false; // keep an open table open
  replace(element, figure, table);
  redraw(figure, signal, () => replace(figure, drawDistribution(figure.clientWidth, chart)));
}

function heights(chart) {
  return chart.series.map(({ counts }) => {
    const total = chart.shares ? Math.max(1, sum(counts)) : 1;
    return Array.from(counts, (c) => c / total);
  });
}

function drawDistribution(width, chart) {
  const { edges, series, log = false, height = 210 } = chart;
  const [left, right, top, bottom] = [46, 10, 18, 42];
  const n = edges.length - 1;
  const x = new Scale(edges[0], edges[n], left, width - right, log);
  const tall = heights(chart);
  const most = Math.max(...tall.flat(), chart.shares ? 0.001 : 1);
  const y = new Scale(0, most, height - bottom, top);
  const root = svg("svg", { width, height, role: "img", "aria-label": chart.title });

  for (const tick of y.ticks(3)) {
    if (!chart.shares && !Number.isInteger(tick)) continue;
    const at = Math.round(y.at(tick)) + 0.5;
    root.append(
      svg("line", { class: "grid-line", x1: left, x2: width - right, y1: at, y2: at }),
      svg("text", { class: "tick", x: left - 7, y: at + 4, "text-anchor": "end" }, tickText(tick, chart.shares)),
    );
  }
  for (const tick of x.ticks(Math.max(2, Math.floor(width / 90)))) {
    const at = x.at(tick);
    if (at < left - 1 || at > width - right + 1) continue;
    root.append(svg("text", { class: "tick", x: at, y: height - bottom + 16, "text-anchor": "middle" }, tickText(tick, chart.percent)));
  }
  root.append(
    svg("text", { class: "axis-name", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, chart.axis),
  );
  series.forEach(({ paint }, s) => root.append(chart.shares ? outline(x, y, edges, tall[s], paint) : bars(x, y, edges, tall[s], paint)));
  root.append(svg("line", { class: "axis-line", x1: left, x2: width - right, y1: height - bottom + 0.5, y2: height - bottom + 0.5 }));
  for (const mark of chart.marks ?? []) {
    if (!Number.isFinite(mark.at)) continue;
    const at = x.at(mark.at);
    root.append(
      svg("line", { class: "mark-line", x1: at, x2: at, y1: top - 4, y2: height - bottom, stroke: `var(${mark.paint ?? "--ink-2"})` }),
      svg("text", { class: "mark-name", x: at, y: top - 7, "text-anchor": at > width - 80 ? "end" : at < left + 40 ? "start" : "middle" }, mark.label),
    );
  }
  for (let i = 0; i < n; i++) {
    const [from, to] = [x.at(edges[i]), x.at(edges[i + 1])];
    const zone = svg("rect", { class: chart.onPick ? "zone pick" : "zone", x: from, y: top, width: Math.max(0.5, to - from), height: height - bottom - top });
    zone.addEventListener("pointermove", (event) =>
      showTip(
        event.clientX,
        event.clientY,
        h("strong", {}, `${chart.text(edges[i])} to ${chart.text(edges[i + 1])}`),
        series.map(({ label, counts }, s) =>
          h("div", {}, `${label}: ${whole(counts[i])}${chart.shares ? ` (${percent(tall[s][i])})` : ""}`),
        ),
      ),
    );
    zone.addEventListener("pointerleave", hideTip);
    if (chart.onPick) zone.addEventListener("click", () => (hideTip(), chart.onPick(edges[i], edges[i + 1])));
    root.append(zone);
  }
  return root;
}

function bars(x, y, edges, tall, paint) {
  const group = svg("g", { fill: `var(${paint})` });
  for (let i = 0; i < tall.length; i++) {
    if (!tall[i]) continue;
    const [from, to] = [x.at(edges[i]), x.at(edges[i + 1])];
    const gap = to - from > 4 ? 1 : 0;
    // A bin of one neuron among thousands must stay visible.
    const up = Math.max(1.5, y.at(0) - y.at(tall[i]));
    group.append(svg("rect", { x: from, y: y.at(0) - up, width: Math.max(0.5, to - from - gap), height: up }));
  }
  return group;
}

function outline(x, y, edges, tall, paint) {
  let path = `M${x.at(edges[0])} ${y.at(0)}`;
  for (let i = 0; i < tall.length; i++) path += `V${y.at(tall[i])}H${x.at(edges[i + 1])}`;
  path += `V${y.at(0)}`;
  return svg("path", { d: path, class: "outline", fill: `var(${paint})`, stroke: `var(${paint})` });
}

function distributionTable({ edges, series, text }) {
  return asTable(
    ["From", "to", ...series.map(({ label }) => label)],
    () => Array.from(series[0].counts, (_, i) => [text(edges[i]), text(edges[i + 1]), ...series.map(({ counts }) => whole(counts[i]))]),
  );
}

/**
 * Stacked bars: every row is divided into the same kinds, as shares of the row.
 *
 * @param {{label: string, counts: number[], total: number}[]} chart.rows
 * @param {{label: string, paint: string}[]} chart.kinds
 * @param {(row: number, kind: number) => void} chart.onPick
 */
export function stackedRows(element, chart, signal) {
  const figure = h("div", { class: "chart" });
  const key = h(
    "ul",
    { class: "legend" },
    chart.kinds.map(({ label, paint }) => h("li", {}, swatch(paint), label)),
  );
  const table = asTable(
    [chart.rowName, ...chart.kinds.map(({ label }) => label)],
    () => chart.rows.map(({ label, counts }) => [label, ...counts.map(whole)]),
  );
  replace(element, key, figure, table);
  redraw(figure, signal, () => replace(figure, drawRows(figure.clientWidth, chart)));
}

export function swatch(paint) {
  return h("span", { class: "swatch", style: { background: `var(${paint})` }, "aria-hidden": "true" });
}

function drawRows(width, chart) {
  const { rows, kinds } = chart;
  const longest = Math.max(...rows.map(({ label }) => label.length));
  const left = Math.min(width * 0.34, longest * 6.6 + 10);
  const fits = Math.floor(left / 6.6);
  const step = rows.length > 16 ? 15 : rows.length > 6 ? 22 : rows.length > 3 ? 34 : 56;
  const height = rows.length * step + 26;
  const x = new Scale(0, 1, left, width - 8);
  const root = svg("svg", { width, height, role: "img", "aria-label": chart.title });
  rows.forEach(({ label, counts, total }, r) => {
    const y = r * step;
    const short = label.length > fits ? shortened(label, fits) : label;
    root.append(svg("text", { class: "tick", x: left - 8, y: y + step / 2 + 3.5, "text-anchor": "end" }, short));
    let before = 0;
    counts.forEach((count, k) => {
      if (!count) return;
      const [from, to] = [x.at(before / total), x.at((before + count) / total)];
      before += count;
      const bar = svg("rect", {
        class: "segment",
        x: from,
        y: y + 1,
        width: Math.max(0.75, to - from - (to - from > 3 ? 1 : 0)),
        height: step - 3,
        fill: `var(${kinds[k].paint})`,
      });
      bar.addEventListener("pointermove", (event) =>
        showTip(event.clientX, event.clientY, h("strong", {}, label), h("div", {}, `${kinds[k].label}: ${whole(count)} of ${whole(total)}`)),
      );
      bar.addEventListener("pointerleave", hideTip);
      bar.addEventListener("click", () => (hideTip(), chart.onPick(r, k)));
      root.append(bar);
    });
  });
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    root.append(
      svg("text", { class: "tick", x: x.at(tick), y: height - 8, "text-anchor": tick === 1 ? "end" : tick === 0 ? "start" : "middle" }, percent(tick)),
    );
  }
  return root;
}

/** Shortens a name in the middle: its number and its end tell layers apart. */
function shortened(label, fits) {
  const [number] = label.match(/^\d+ · /) ?? [""];
  return `${number}…${label.slice(label.length - Math.max(1, fits - number.length - 1))}`;
}

/** A folded table of the chart's data, built when opened. */
export function asTable(head, rows) {
  const box = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "The chart as a table" });
  const details = h("details", { class: "alternative" }, h("summary", {}, "As a table"), box);
  details.addEventListener("toggle", () => {
    if (!details.open || box.firstChild) return;
    box.append(
      h(
        "table",
        { class: "plain" },
        h("thead", {}, h("tr", {}, head.map((name, i) => h("th", { scope: "col", class: i ? "num" : null }, name)))),
        h("tbody", {}, rows().map((row) => h("tr", {}, row.map((cell, i) => (i ? h("td", { class: "num" }, cell) : h("th", { scope: "row" }, cell)))))),
      ),
    );
  });
  return details;
}

function sum(values) {
  let total = 0;
  for (let i = 0; i < values.length; i++) total += values[i];
  return total;
}
