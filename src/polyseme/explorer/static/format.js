// Formats numbers and names for display.

const WHOLE = new Intl.NumberFormat("en-GB");

/** 34638 -> "34,638" */
export function whole(value) {
  return Number.isFinite(value) ? WHOLE.format(value).replace("-", "−") : "–";
}

/** A measured number with a few significant digits; NaN is a dash. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (Number.isInteger(value)) return whole(value);
  const size = Math.abs(value);
  let text;
  if (size >= 10_000) text = WHOLE.format(Math.round(value));
  else if (size >= 0.001) text = value.toFixed(Math.max(0, Math.min(6, digits - 1 - Math.floor(Math.log10(size)))));
  else text = value.toExponential(Math.max(0, digits - 2));
  return text.replace("-", "−");
}

/** 0.1234 -> "12.3%" */
export function percent(value) {
  if (!Number.isFinite(value)) return "–";
  const p = 100 * value;
  if (p === 0) return "0%";
  if (Math.abs(p) < 0.1) return p > 0 ? "<0.1%" : ">−0.1%";
  if (p > 99.9 && p < 100) return ">99.9%";
  const fine = Math.abs(p) < 10 || (p > 99 && p < 100); // 99.8% is not all
  return `${p.toFixed(fine ? 1 : 0)}%`.replace("-", "−");
}

const RIGHT_TO_LEFT = /[\u0590-\u08ff\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

/** Isolates a right-to-left name, so that it doesn't reorder the text around it. */
export function isolated(name) {
  return RIGHT_TO_LEFT.test(name) ? `\u2068${name}\u2069` : name;
}

/** 1 -> "1 neuron", 2 -> "2 neurons" */
export function count(n, one, many = `${one}s`) {
  return `${whole(n)} ${n === 1 ? one : many}`;
}

/** Formats a metric's value. `kind` as in metrics.js. */
export function value(v, kind) {
  if (kind === "share") return percent(v);
  if (kind === "integer") return whole(v);
  if (kind === "distance") return Number.isFinite(v) ? v.toFixed(3).replace("-", "−") : "–";
  return number(v);
}
