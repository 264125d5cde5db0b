// Tables as CSV files (RFC 4180), to go on with elsewhere.

import { h } from "./dom.js";

/** The text of a file: numbers in full, an empty cell for what isn't a number. */
export function csv(head, rows) {
  return [head, ...rows].map((cells) => `${cells.map(cell).join(",")}\r\n`).join("");
}

function cell(value) {
  if (typeof value === "number") return Number.isNaN(value) ? "" : shortest(value);
  // A spreadsheet would run a stranger's name that begins as a formula does.
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** The fewest digits that give a number back, in the half of the bits that most of ours have where that's all of it. */
function shortest(value) {
  if (Math.fround(value) !== value) return String(value);
  for (let digits = 6; digits < 9; digits++) {
    const rounded = Number(value.toPrecision(digits));
    if (Math.fround(rounded) === value) return String(rounded);
  }
  return String(Number(value.toPrecision(9)));
}

/** Gives the reader a file to keep. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000); // once it's read
}
