// A table of very many rows: only the visible rows are in the document. Screen readers see a real table, with
// row numbers; the arrow keys move between rows.

import { h, replace } from "./dom.js";

const ROW = 34; // CSS pixels; style: .rows tbody tr
const MORE = 8; // rows beyond the view, so that scrolling shows no gap

/**
 * @typedef {object} Column
 * @property {string} name
 * @property {string} label
 * @property {string} [hint]  a sentence
 * @property {boolean} [num]
 * @property {(row: number) => Node | string} cell
 */
export class Grid {
  /**
   * @param {HTMLElement} element  filled
   * @param {{label: string, columns: Column[], onSort: (name: string) => void, empty: string}} options
   *   The first column holds the row's link.
   * @param {AbortSignal} signal
   */
  constructor(element, { label, columns, onSort, empty }, signal) {
    this._onSort = onSort;
    this._rows = [];
    this._columns = columns;
    this._empty = empty;
    this._sort = "";
    this._marked = null;
    this._first = -1;
    this._frame = 0;
    this._head = h("thead");
    this._body = h("tbody");
    this._table = h("table", { "aria-label": label }, this._head, this._body);
    this.box = h(
      "div",
      { class: "rows", tabindex: 0, role: "region", "aria-label": label, "data-keys": true },
      this._table,
    );
    replace(element, this.box);
    this.box.addEventListener("scroll", () => {
      cancelAnimationFrame(this._frame);
      this._frame = requestAnimationFrame(() => this._fill());
    });
    this.box.addEventListener("keydown", (event) => this._key(event));
    const observer = new ResizeObserver(() => this._fill());
    observer.observe(this.box);
    signal.addEventListener("abort", () => observer.disconnect());
  }

  /** Shows rows in the given order; `sort` is the column they are sorted by, with "-" in front if descending. */
  show(rows, sort, columns = this._columns) {
    const moved = sort !== this._sort || rows.length !== this._rows.length;
    this._rows = rows;
    this._sort = sort;
    this._columns = columns;
    this._table.setAttribute("aria-rowcount", rows.length + 1);
    this._drawHead();
    this._first = -1;
    if (moved) this.box.scrollTop = 0;
    this._fill();
  }

  /** Marks the row that is shown next to the table. */
  mark(row) {
    this._marked = row;
    for (const line of this._body.querySelectorAll("tr[data-at]")) this._setMark(line);
  }

  _setMark(line) {
    if (this._rows[line.dataset.at] === this._marked) line.setAttribute("aria-current", "true");
    else line.removeAttribute("aria-current");
  }

  _drawHead() {
    const name = this._sort.replace(/^-/, "");
    const down = this._sort.startsWith("-");
    const focused = this._head.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    replace(
      this._head,
      h(
        "tr",
        { "aria-rowindex": 1 },
        this._columns.map((column) =>
          h(
            "th",
            {
              scope: "col",
              class: column.num ? "num" : null,
              "aria-sort": column.name === name ? (down ? "descending" : "ascending") : null,
            },
            h(
              "button",
              { type: "button", class: "sort", title: column.hint, dataset: { name: column.name }, onclick: () => this._onSort(column.name) },
              column.label,
              h("span", { class: "arrow", "aria-hidden": "true" }, column.name === name ? (down ? "↓" : "↑") : ""),
            ),
          ),
        ),
      ),
    );
    if (focused) this._head.querySelector(`[data-name="${CSS.escape(focused)}"]`)?.focus();
  }

  _fill() {
    const { box } = this;
    const inView = Math.ceil((box.clientHeight || 400) / ROW);
    const first = Math.max(0, Math.min(this._rows.length - inView, Math.floor(box.scrollTop / ROW)) - MORE);
    const last = Math.min(this._rows.length, first + inView + 2 * MORE);
    if (first === this._first && last === this._last) return;
    this._first = first;
    this._last = last;
    const focused = this._focusedIndex();
    const lines = [];
    for (let i = first; i < last; i++) lines.push(this._line(i));
    if (!this._rows.length) {
      lines.push(h("tr", {}, h("td", { colspan: this._columns.length, class: "empty" }, this._empty)));
    }
    replace(this._body, space(first, this._columns), lines, space(this._rows.length - last, this._columns));
    if (focused >= first && focused < last) this._link(focused)?.focus({ preventScroll: true });
    else if (focused >= 0) box.focus({ preventScroll: true });
  }

  _line(i) {
    const row = this._rows[i];
    const line = h(
      "tr",
      { "aria-rowindex": i + 2, dataset: { at: i } },
      this._columns.map((column, c) =>
        c ? h("td", { class: column.num ? "num" : null }, column.cell(row)) : h("th", { scope: "row" }, column.cell(row)),
      ),
    );
    this._setMark(line);
    return line;
  }

  _link(i) {
    return this._body.querySelector(`tr[data-at="${i}"] a`);
  }

  _focusedIndex() {
    const line = document.activeElement?.closest?.("tr[data-at]");
    return line && this._body.contains(line) ? Number(line.dataset.at) : -1;
  }

  _key(event) {
    const page = Math.max(1, Math.floor(this.box.clientHeight / ROW) - 2);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey || !this._rows.length) return;
    if (this._head.contains(event.target)) return;
    event.preventDefault();
    const at = this._focusedIndex();
    const from = at >= 0 ? at : Math.ceil(this.box.scrollTop / ROW) - Math.sign(step);
    const to = Math.max(0, Math.min(this._rows.length - 1, from + step));
    const top = to * ROW;
    const view = this.box.clientHeight - 2 * ROW; // the head covers one row
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top > this.box.scrollTop + view) this.box.scrollTop = top - view;
    this._fill();
    this._link(to)?.focus({ preventScroll: true });
  }
}

function space(rows, columns) {
  if (rows <= 0) return null;
  const cell = h("td", { colspan: columns.length });
  cell.style.setProperty("height", `${rows * ROW}px`);
  return h("tr", { class: "space", "aria-hidden": "true" }, cell);
}
