// Tables as CSV files (RFC 4180).

import { h } from "./dom.js";

/** The text of a file: numbers in full precision, NaN as an empty cell. */
export function csv(head, rows) {
  return [head, ...rows].map((cells) => `${cells.map(cell).join(",")}\r\n`).join("");
}

function cell(value) {
  if (typeof value === "number") return Number.isNaN(value) ? "" : shortest(value);
  // A spreadsheet would evaluate an untrusted name that starts like a formula.
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** The fewest digits that identify a number, among single-precision numbers if it is one. */
function shortest(value) {
  if (Math.fround(value) !== value) return String(value);
  for (let digits = 6; digits < 9; digits++) {
    const rounded = Number(value.toPrecision(digits));
    if (Math.fround(rounded) === value) return String(rounded);
  }
  return String(Number(value.toPrecision(9)));
}

/** Saves a text as a file. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000); // after the browser has read it
}
