// A table of all neurons of a run, sortable by any column.

import { csv, download } from "./csv.js";
import * as data from "./data.js";
import { h, replace } from "./dom.js";
import { count, value } from "./format.js";
import { Grid } from "./grid.js";
import { neuronName } from "./lookup.js";
import { metric } from "./metrics.js";
import { neuronAddress } from "./route.js";

export function neuronTable(element, { run, table, names, change }, signal) {
  const box = h("div");
  const save = h("button", { type: "button", onclick: () => download(`${run.title.replace(/[^\p{L}\p{N}._-]+/gu, "-")}-neurons.csv`, "text/csv", asCsv()) }, "Download CSV");
  replace(element, h("header", {}, h("h2", {}, "All neurons"), h("p", { class: "reading" }, "Click a column heading to sort."), save), box);
  const columns = [
    { name: "neuron", label: "Neuron", hint: "Layer and number", cell: link },
    ...names.map((name) => {
      const { label, reading, kind } = metric(name);
      const values = table.column(name);
      return { name, label, hint: reading, num: true, cell: (row) => value(values[row], kind) };
    }),
  ];
  // Most meanings first, if they are counted.
  const usual = names.includes("n_meanings") ? "-n_meanings" : "neuron";
  let sort = usual;
  let rows = [];
  const grid = new Grid(
    box,
    {
      label: "All neurons",
      columns,
      empty: "No neurons match the selection.",
      onSort(name) {
        // Metrics are sorted in descending order first.
        const down = name === "neuron" ? sort === "neuron" : sort !== `-${name}`;
        change({ sort: down ? `-${name}` : name });
      },
    },
    signal,
  );

  function link(row) {
    const { site, neuron } = data.neuronOf(run, row);
    return h(
      "a",
      { href: neuronAddress(run, site.number, neuron), title: site.name, onpointerenter: () => data.prefetch(run, row) },
      neuronName(run, site, neuron),
    );
  }

  /** The rows that are shown, with the columns of `neurons.parquet`. */
  function asCsv() {
    const values = names.map((name) => table.column(name));
    return csv(["site", "neuron", ...names], rows.map((row) => {
      const { site, neuron } = data.neuronOf(run, row);
      return [site.name, neuron, ...values.map((column) => column[row])];
    }));
  }

  return {
    show(query, keep) {
      const asked = query.get("sort") ?? usual;
      const name = asked.replace(/^-/, "");
      sort = name === "neuron" || names.includes(name) ? asked : usual;
      rows = sorted(table, sort, keep);
      grid.show(rows, sort);
      save.title = `${count(rows.length, "neuron")}: the current selection, in this order`;
    },
  };
}

/** Rows in order; those without a value come last in either direction, ties by number. */
function sorted(table, sort, keep) {
  const rows = [];
  for (let row = 0; row < table.n; row++) if (!keep || keep[row]) rows.push(row);
  const name = sort.replace(/^-/, "");
  const sign = sort.startsWith("-") ? -1 : 1;
  if (name === "neuron") return sign < 0 ? rows.reverse() : rows;
  const values = table.column(name);
  return rows.sort((a, b) => {
    const [u, v] = [values[a], values[b]];
    if (Number.isNaN(u) || Number.isNaN(v)) return Number.isNaN(u) - Number.isNaN(v) || a - b;
    return sign * (u - v) || a - b;
  });
}
