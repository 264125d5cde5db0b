// The selection of neurons, by layer and by metrics, as in the address:
// layer=12&density=0.01..0.1&n_clusters=2..

import { h, replace, uniqueId } from "./dom.js";
import { whole } from "./format.js";
import { metric } from "./metrics.js";
import { noSite, siteName, siteOf } from "./lookup.js";

/**
 * @typedef {{name: string, lo: number, hi: number}} Range  an open end is infinite
 * @typedef {{layer: number | null, ranges: Range[], problem: string | null}} Selection  `layer` is a site's number
 */

/** @returns {Selection} the parts of `query` about the columns `names`; the rest is ignored */
export function readSelection(run, names, query) {
  const layer = query.get("layer");
  const site = layer === null ? null : siteOf(run, layer);
  const ranges = [];
  for (const name of names) {
    const match = (query.get(name) ?? "").match(/^(.*)\.\.(.*)$/);
    if (!match) continue;
    const [lo, hi] = [match[1] === "" ? -Infinity : Number(match[1]), match[2] === "" ? Infinity : Number(match[2])];
    if (!Number.isNaN(lo) && !Number.isNaN(hi)) ranges.push({ name, lo, hi });
  }
  return { layer: site ? site.number : null, ranges, problem: layer === null || site ? null : noSite(run, layer) };
}

/** A range as in the address; "" if it is open at both ends. */
export function rangeText(lo, hi) {
  const end = (v) => (Number.isFinite(v) ? String(Number(v.toPrecision(6))) : "");
  const text = `${end(lo)}..${end(hi)}`;
  return text === ".." ? "" : text;
}

/** 1 for each neuron of the selection (a NaN is in no range), and their number. */
export function select(run, table, { layer, ranges }) {
  const keep = new Uint8Array(table.n).fill(1);
  if (layer !== null) {
    const { first, n_neurons } = run.sites.find((s) => s.number === layer);
    keep.fill(0, 0, first);
    keep.fill(0, first + n_neurons);
  }
  for (const { name, lo, hi } of ranges) {
    const values = table.column(name);
    for (let i = 0; i < keep.length; i++) if (!(values[i] >= lo && values[i] <= hi)) keep[i] = 0;
  }
  let n = 0;
  for (let i = 0; i < keep.length; i++) n += keep[i];
  return { keep, n };
}

/**
 * The controls of the selection. `change` is called with changes of the query.
 *
 * @returns {{show: (selection: Selection, n: number) => void}}
 */
export function selectionControls(element, run, names, change) {
  const layer = h(
    "select",
    { onchange: () => change({ layer: layer.value }) },
    h("option", { value: "" }, "all"),
    run.sites.map((site) => h("option", { value: site.address }, siteName(run, site))),
  );
  const add = h("select", { "aria-label": "Add a filter by a metric" });
  add.addEventListener("change", () => {
    if (!add.value) return;
    shown.ranges.push({ name: add.value, lo: -Infinity, hi: Infinity });
    const { value } = add;
    draw();
    ranges.querySelector(`[data-name="${CSS.escape(value)}"] input`).focus();
  });
  const ranges = h("div", { class: "ranges" });
  const result = h("p", { class: "result", role: "status" });
  const clear = h("button", { type: "button", class: "quiet", onclick: () => change(cleared(names)) }, "Clear");
  let shown = { layer: null, ranges: [] };

  function draw() {
    layer.value = shown.layer === null ? "" : run.sites[shown.layer].address;
    const used = new Set(shown.ranges.map(({ name }) => name));
    replace(
      add,
      h("option", { value: "" }, "Filter by …"),
      names.filter((name) => !used.has(name)).map((name) => h("option", { value: name }, metric(name).label)),
    );
    replace(ranges, shown.ranges.map(rangeField));
    clear.hidden = shown.layer === null && !shown.ranges.length;
  }

  function rangeField({ name, lo, hi }) {
    const field = (which, value) =>
      h("input", {
        type: "text",
        inputmode: "decimal",
        size: 6,
        "aria-label": `${metric(name).label} ${which}`,
        placeholder: which === "from" ? "min" : "max",
        value: Number.isFinite(value) ? String(Number(value.toPrecision(6))) : "",
        id: uniqueId("range"),
      });
    const [from, to] = [field("from", lo), field("to", hi)];
    const changed = () => {
      const [a, b] = [from, to].map((f) => (f.value.trim() === "" ? NaN : Number(f.value.trim().replace("−", "-"))));
      const wrong = [from, to].map((f, i) => f.value.trim() !== "" && Number.isNaN([a, b][i]));
      [from, to].forEach((f, i) => f.setAttribute("aria-invalid", String(wrong[i])));
      if (!wrong.some(Boolean)) change({ [name]: rangeText(Number.isNaN(a) ? -Infinity : a, Number.isNaN(b) ? Infinity : b) });
    };
    from.addEventListener("change", changed);
    to.addEventListener("change", changed);
    return h(
      "span",
      { class: "range", dataset: { name } },
      metric(name).label,
      from,
      "to",
      to,
      h(
        "button",
        {
          type: "button",
          class: "quiet",
          "aria-label": `Remove the filter by ${metric(name).label}`,
          onclick: () => {
            shown = { ...shown, ranges: shown.ranges.filter((r) => r.name !== name) };
            draw();
            change({ [name]: null });
          },
        },
        "×",
      ),
    );
  }

  replace(
    element,
    h("div", { class: "selection" }, run.sites.length > 1 && h("label", { class: "field" }, "Layer", layer), ranges, add, clear, result),
  );
  return {
    show(selection, n) {
      // A new filter that is still open at both ends isn't in the address yet.
      const open = shown.ranges.filter(
        (r) => r.lo === -Infinity && r.hi === Infinity && !selection.ranges.some((s) => s.name === r.name) && ranges.querySelector(`[data-name="${CSS.escape(r.name)}"] input:focus`),
      );
      shown = { layer: selection.layer, ranges: [...selection.ranges, ...open] };
      draw();
      replace(result, selection.problem && `${selection.problem} `, h("strong", {}, whole(n)), ` of ${whole(run.n_neurons)} neurons`);
    },
  };
}

function cleared(names) {
  return { layer: null, ...Object.fromEntries(names.map((name) => [name, null])) };
}
