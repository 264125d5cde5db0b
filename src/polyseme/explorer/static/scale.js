// Maps numbers to positions on an axis, and computes its ticks.

/**
 * A linear or logarithmic axis: `at(value)` is a position between `from` and `to`, and
 * `value(position)` the inverse. A domain of a single value is widened.
 */
export class Scale {
  constructor(lo, hi, from, to, log = false) {
    this.log = log;
    this.from = from;
    this.to = to;
    this.lo = log ? Math.log10(lo) : lo;
    this.hi = log ? Math.log10(hi) : hi;
    if (!(this.hi > this.lo)) {
      const room = log ? 0.5 : Math.abs(this.lo) * 0.05 || 0.5;
      this.lo -= room;
      this.hi += room;
    }
  }

  at(value) {
    const v = this.log ? Math.log10(value) : value;
    return this.from + ((v - this.lo) / (this.hi - this.lo)) * (this.to - this.from);
  }

  value(place) {
    const v = this.lo + ((place - this.from) / (this.to - this.from)) * (this.hi - this.lo);
    return this.log ? 10 ** v : v;
  }

  /** About `n` round values in the domain. */
  ticks(n) {
    if (this.log && this.hi - this.lo > 1.2) {
      const each = Math.max(1, Math.ceil((this.hi - this.lo) / n));
      const powers = [];
      for (let p = Math.ceil(this.lo - 1e-9); p <= this.hi + 1e-9; p += each) powers.push(10 ** p);
      return powers;
    }
    const [lo, hi] = this.log ? [10 ** this.lo, 10 ** this.hi] : [this.lo, this.hi];
    const rough = (hi - lo) / Math.max(1, n);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * ([1, 2, 5, 10].find((m) => m * power >= rough * 0.999) ?? 10);
    const values = [];
    for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++) {
      values.push(Number((i * step).toPrecision(12)));
    }
    return values;
  }
}

/** A tick's text, as short as possible. */
export function tickText(value, share = false) {
  if (share) return `${Number((100 * value).toPrecision(3))}%`;
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(0).replace("e+", "e").replace("-", "−");
  if (size >= 1000) return new Intl.NumberFormat("en-GB").format(value);
  return String(Number(value.toPrecision(6))).replace("-", "−");
}

/** Smallest and largest finite value (positive ones only with `log`), or null if there is none. */
export function extent(values, log = false) {
  let lo = Infinity;
  let hi = -Infinity;
  for (let i = 0; i < values.length; i++) {
    const v = values[i];
    if (!Number.isFinite(v) || (log && v <= 0)) continue;
    if (v < lo) lo = v;
    if (v > hi) hi = v;
  }
  return lo <= hi ? [lo, hi] : null;
}

/**
 * Whether an axis of these values should be logarithmic: `wanted` says so, and the values are
 * positive (except for dead neurons' zeros) and span more than a factor of ten.
 */
export function logarithmic(values, wanted) {
  if (!wanted) return false;
  for (let i = 0; i < values.length; i++) if (values[i] < 0) return false;
  const range = extent(values, true);
  return range !== null && range[1] / range[0] > 10;
}

/** The value below which a share `q` of the finite values lies; NaN if there are none. */
export function quantile(values, q) {
  const finite = Float64Array.from(values).filter(Number.isFinite).sort();
  if (!finite.length) return NaN;
  const at = q * (finite.length - 1);
  const low = Math.floor(at);
  return finite[low] + (at - low) * ((finite[low + 1] ?? finite[low]) - finite[low]);
}

/** Edges of `n` equal bins (in the logarithm if the axis is logarithmic); integers get whole bins. */
export function binEdges(lo, hi, { n = 40, log = false, integer = false } = {}) {
  if (integer && !log) {
    const width = Math.max(1, Math.ceil((hi - lo + 1) / n));
    const bins = Math.ceil((hi - lo + 1) / width);
    return Float64Array.from({ length: bins + 1 }, (_, i) => lo - 0.5 + i * width);
  }
  const scale = new Scale(lo, hi, 0, n, log);
  return Float64Array.from({ length: n + 1 }, (_, i) => scale.value(i));
}

/** How many values fall in each bin; the last bin includes its upper edge. `keep`, if given, is 1 for values that count. */
export function binCounts(values, edges, { log = false, keep = null } = {}) {
  const n = edges.length - 1;
  const counts = new Uint32Array(n);
  const scale = new Scale(edges[0], edges[n], 0, n, log);
  for (let i = 0; i < values.length; i++) {
    const v = values[i];
    if (!Number.isFinite(v) || (log && v <= 0) || (keep && !keep[i])) continue;
    const bin = Math.floor(scale.at(v) + 1e-9);
    if (bin >= 0 && bin <= n) counts[Math.min(bin, n - 1)] += 1;
  }
  return counts;
}
