// A scatter plot of very many points on a canvas, with zoom, pan and tooltips. It draws 46,080 points
// in a few milliseconds, because it blends them into the canvas's pixels itself.

import { h, replace, colour, colourParts, redraw } from "./dom.js";
import { Scale, tickText } from "./scale.js";
import { showTip, hideTip } from "./tip.js";

const MARGIN = { left: 54, right: 12, top: 10, bottom: 42 };
const STRIDE = 7919; // a prime: every point gets its turn
const CLOSEST = 0.002; // share of the whole range at maximum zoom

/**
 * @typedef {{values: ArrayLike<number>, lo: number, hi: number, log: boolean, label: string, percent?: boolean}} Axis
 *
 * @typedef {object} Points
 * @property {Axis} x
 * @property {Axis} y
 * @property {Uint8Array} shade  index into `paints` for each point
 * @property {[number, number, number][]} paints
 * @property {Uint8Array | null} keep  1 where a point is in the selection; others are drawn faintly
 * @property {boolean} diagonal  whether to draw where x = y
 */

export class Scatter {
  /**
   * @param {HTMLElement} element  filled
   * @param {{label: string, tip: (i: number) => (Node|string)[], onPick: (i: number) => void, height?: () => number}} options
   * @param {AbortSignal} signal
   */
  constructor(element, { label, tip, onPick, height = () => 440 }, signal) {
    this._tip = tip;
    this._onPick = onPick;
    this._height = height;
    this._points = null;
    this._view = null; // [x0, x1, y0, y1] as shares of the whole ranges
    this._hovered = -1;
    this._frame = 0;
    this.canvas = h("canvas", { tabindex: 0, role: "img", "aria-label": label, "data-keys": true });
    const button = (text, name, action) =>
      h("button", { type: "button", "aria-label": name, title: name, onclick: action }, text);
    replace(
      element,
      h(
        "div",
        { class: "scatter" },
        this.canvas,
      ),
    );
    /** Buttons for readers without a wheel; the caller places them. */
    this.buttons = h(
      "div",
      { class: "zoom", role: "group", "aria-label": "Zoom" },
      button("+", "Zoom in", () => this._zoom(0.6)),
      button("−", "Zoom out", () => this._zoom(1 / 0.6)),
      button("⤢", "Show all", () => this._showAll()),
    );
    this._listen();
    redraw(element, signal, () => this._draw());
    signal.addEventListener("abort", () => cancelAnimationFrame(this._frame));
  }

  /** @param {Points} points */
  show(points) {
    const sameAxes = this._points && ["x", "y"].every((a) => this._points[a].label === points[a].label);
    this._points = points;
    if (!sameAxes || !this._view) this._view = [0, 1, 0, 1];
    this._locate();
    this._hovered = -1;
    this.redraw();
  }

  redraw() {
    cancelAnimationFrame(this._frame);
    this._frame = requestAnimationFrame(() => this._draw());
  }

  /** Each point's position as shares of the whole ranges; NaN if it has none. */
  _locate() {
    const place = ({ values, lo, hi, log }) => {
      const scale = new Scale(lo, hi, 0.03, 0.97, log);
      return Float32Array.from(values, (v) => (Number.isFinite(v) && (!log || v > 0) ? scale.at(v) : NaN));
    };
    this._x = place(this._points.x);
    this._y = place(this._points.y);
  }

  _size() {
    const width = this.canvas.parentElement.clientWidth;
    return { width, height: this._height(width) };
  }

  _area() {
    const { width, height } = this._size();
    return { left: MARGIN.left, top: MARGIN.top, width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  }

  // ---------------------------------------------------------------------------- drawing

  _draw() {
    const { width, height } = this._size();
    if (!this._points || width < 100) return;
    const ratio = window.devicePixelRatio || 1;
    const { canvas } = this;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.setProperty("width", `${width}px`);
      canvas.style.setProperty("height", `${height}px`);
    }
    const g = canvas.getContext("2d", { willReadFrequently: true });
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, width, height);
    this._drawAxes(g, width, height);
    this._drawPoints(g, ratio);
    this._drawHovered(g);
  }

  _drawAxes(g, width, height) {
    const area = this._area();
    const [ink, line] = [colour("--ink-3"), colour("--line")];
    g.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    g.lineWidth = 1;
    g.fillStyle = ink;
    g.strokeStyle = line;
    const { x, y } = this._axes();
    g.textAlign = "center";
    for (const tick of x.ticks(Math.max(2, area.width / 100))) {
      const at = Math.round(x.at(tick)) + 0.5;
      if (at < area.left - 0.5 || at > area.left + area.width + 1) continue;
      stroke(g, at, area.top, at, area.top + area.height);
      g.fillText(tickText(tick, this._points.x.percent), at, area.top + area.height + 16);
    }
    g.textAlign = "right";
    for (const tick of y.ticks(Math.max(2, area.height / 60))) {
      const at = Math.round(y.at(tick)) + 0.5;
      if (at < area.top - 0.5 || at > area.top + area.height + 1) continue;
      stroke(g, area.left, at, area.left + area.width, at);
      g.fillText(tickText(tick, this._points.y.percent), area.left - 6, at + 4);
    }
    g.textAlign = "center";
    g.fillStyle = colour("--ink-2");
    g.fillText(this._points.x.label, area.left + area.width / 2, height - 6);
    g.save();
    g.translate(12, area.top + area.height / 2);
    g.rotate(-Math.PI / 2);
    g.fillText(this._points.y.label, 0, 0);
    g.restore();
  }

  /** The axes of what's in view, in CSS pixels. */
  _axes() {
    const area = this._area();
    const [x0, x1, y0, y1] = this._view;
    const axis = ({ lo, hi, log }, from, to, a, b) => {
      const whole = new Scale(lo, hi, 0.03, 0.97, log);
      return new Scale(whole.value(from), whole.value(to), a, b, log);
    };
    return {
      x: axis(this._points.x, x0, x1, area.left, area.left + area.width),
      y: axis(this._points.y, y0, y1, area.top + area.height, area.top),
    };
  }

  _drawPoints(g, ratio) {
    const area = this._area();
    const [left, top] = [Math.round(area.left * ratio), Math.round(area.top * ratio)];
    const [w, ht] = [Math.round(area.width * ratio), Math.round(area.height * ratio)];
    if (w < 1 || ht < 1) return;
    const image = g.getImageData(left, top, w, ht);
    const pixels = image.data;
    // Fill transparent pixels with the surface colour, so that points can be blended with it.
    const [sr, sg, sb] = colourParts("--surface");
    for (let p = 0; p < pixels.length; p += 4) {
      const a = pixels[p + 3] / 255;
      pixels[p] = pixels[p] * a + sr * (1 - a);
      pixels[p + 1] = pixels[p + 1] * a + sg * (1 - a);
      pixels[p + 2] = pixels[p + 2] * a + sb * (1 - a);
      pixels[p + 3] = 255;
    }
    const { shade, paints, keep } = this._points;
    const [x0, x1, y0, y1] = this._view;
    const radius = this._radius();
    const disc = discOf(radius * ratio);
    const alpha = Math.min(0.9, Math.max(0.35, radius / 3.2));
    const [kx, ky] = [w / (x1 - x0), ht / (y1 - y0)];
    const [xs, ys] = [this._x, this._y];
    // Draw the selection last, so that it is on top.
    for (const selected of keep ? [0, 1] : [1]) {
      const strength = selected ? alpha : 0.09;
      for (let k = 0; k < xs.length; k++) {
        // In a scattered order, so that the last layer doesn't lie on top of all others.
        const i = (k * STRIDE) % xs.length;
        if (keep && keep[i] !== selected) continue;
        const cx = Math.round((xs[i] - x0) * kx);
        const cy = Math.round((y1 - ys[i]) * ky);
        if (!(cx >= 0 && cx < w && cy >= 0 && cy < ht)) continue;
        const [r, gr, b] = paints[shade[i]];
        for (let d = 0; d < disc.length; d += 3) {
          const px = cx + disc[d];
          const py = cy + disc[d + 1];
          if (px < 0 || px >= w || py < 0 || py >= ht) continue;
          const a = disc[d + 2] * strength;
          const p = (py * w + px) * 4;
          pixels[p] += (r - pixels[p]) * a;
          pixels[p + 1] += (gr - pixels[p + 1]) * a;
          pixels[p + 2] += (b - pixels[p + 2]) * a;
        }
      }
    }
    g.putImageData(image, left, top);
    if (this._points.diagonal) this._drawDiagonal(g);
  }

  _radius() {
    const [x0, x1] = this._view;
    const crowd = this._x.length * Math.min(1, (x1 - x0) * 1.2);
    return crowd > 20000 ? 1.5 : crowd > 4000 ? 2 : crowd > 800 ? 2.8 : 3.8;
  }

  _drawDiagonal(g) {
    const { x, y } = this._axes();
    const area = this._area();
    g.save();
    g.beginPath();
    g.rect(area.left, area.top, area.width, area.height);
    g.clip();
    g.setLineDash([5, 4]);
    g.strokeStyle = colour("--ink-3");
    const [a, b] = [x.value(area.left), x.value(area.left + area.width)];
    stroke(g, x.at(a), y.at(a), x.at(b), y.at(b));
    g.restore();
  }

  _drawHovered(g) {
    if (this._hovered < 0) return;
    const [cx, cy] = this._placeOf(this._hovered);
    g.lineWidth = 2;
    g.strokeStyle = colour("--ink");
    g.beginPath();
    g.arc(cx, cy, this._radius() + 3, 0, 2 * Math.PI);
    g.stroke();
  }

  _placeOf(i) {
    const area = this._area();
    const [x0, x1, y0, y1] = this._view;
    return [
      area.left + ((this._x[i] - x0) / (x1 - x0)) * area.width,
      area.top + ((y1 - this._y[i]) / (y1 - y0)) * area.height,
    ];
  }

  // ---------------------------------------------------------------------- pointer and keys

  _listen() {
    const { canvas } = this;
    const fingers = new Map();
    let moved = 0;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, at(event));
      if (fingers.size === 1) moved = 0;
    });
    canvas.addEventListener("pointermove", (event) => {
      const now = at(event);
      const before = fingers.get(event.pointerId);
      if (!before) return this._hover(now, event);
      const others = [...fingers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
      fingers.set(event.pointerId, now);
      moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
      if (others.length) {
        const far = (p) => Math.max(10, Math.hypot(p[0] - others[0][0], p[1] - others[0][1]));
        this._zoom(far(before) / far(now), others[0]);
      } else if (moved > 4) this._pan(now[0] - before[0], now[1] - before[1]);
    });
    const up = (event) => {
      const only = fingers.size === 1;
      fingers.delete(event.pointerId);
      if (event.type === "pointerup" && only && moved <= 4) {
        const i = this._nearest(at(event), event.pointerType === "touch" ? 22 : 12);
        if (i >= 0) (hideTip(), this._onPick(i));
      }
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("pointerleave", () => this._point(-1));
    canvas.addEventListener(
      "wheel",
      (event) => {
        // The wheel scrolls the page, unless the map has the focus.
        if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return;
        event.preventDefault();
        this._zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.006), at(event));
      },
      { passive: false },
    );
    canvas.addEventListener("dblclick", (event) => this._zoom(0.5, at(event)));
    canvas.addEventListener("keydown", (event) => {
      const step = 60;
      const act = {
        ArrowLeft: () => this._pan(step, 0),
        ArrowRight: () => this._pan(-step, 0),
        ArrowUp: () => this._pan(0, step),
        ArrowDown: () => this._pan(0, -step),
        "+": () => this._zoom(0.7),
        "=": () => this._zoom(0.7),
        "-": () => this._zoom(1 / 0.7),
        0: () => this._showAll(),
      }[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act();
    });
  }

  _hover(place, event) {
    const i = this._nearest(place, 12);
    this._point(i);
    if (i >= 0) showTip(event.clientX, event.clientY, this._tip(i));
    else hideTip();
    this.canvas.classList.toggle("on-point", i >= 0);
  }

  _point(i) {
    if (i < 0) hideTip();
    if (i === this._hovered) return;
    this._hovered = i;
    this.redraw();
  }

  /** The point nearest to a place of the canvas, within `reach` pixels; only of the selection, if there is one. */
  _nearest([px, py], reach) {
    if (!this._points) return -1;
    const area = this._area();
    const [x0, x1, y0, y1] = this._view;
    const [kx, ky] = [area.width / (x1 - x0), area.height / (y1 - y0)];
    const [tx, ty] = [x0 + (px - area.left) / kx, y1 - (py - area.top) / ky];
    const { keep } = this._points;
    let best = -1;
    let least = reach * reach;
    for (let i = 0; i < this._x.length; i++) {
      const dx = (this._x[i] - tx) * kx;
      const dy = (this._y[i] - ty) * ky;
      const far = dx * dx + dy * dy;
      if (far < least && (!keep || keep[i])) {
        least = far;
        best = i;
      }
    }
    return best;
  }

  _pan(dx, dy) {
    const area = this._area();
    const [x0, x1, y0, y1] = this._view;
    this._look(x0 - (dx / area.width) * (x1 - x0), y0 + (dy / area.height) * (y1 - y0), x1 - x0, y1 - y0);
  }

  _zoom(by, place = null) {
    const area = this._area();
    const [x0, x1, y0, y1] = this._view;
    const [u, v] = place ? [(place[0] - area.left) / area.width, 1 - (place[1] - area.top) / area.height] : [0.5, 0.5];
    const [w, ht] = [x1 - x0, y1 - y0].map((size) => Math.max(CLOSEST, Math.min(1, size * by)));
    this._look(x0 + u * (x1 - x0 - w), y0 + v * (y1 - y0 - ht), w, ht);
  }

  _showAll() {
    this._look(0, 0, 1, 1);
  }

  _look(x, y, w, ht) {
    const [x0, y0] = [Math.max(0, Math.min(1 - w, x)), Math.max(0, Math.min(1 - ht, y))];
    this._view = [x0, x0 + w, y0, y0 + ht];
    this._hovered = -1;
    hideTip();
    this.redraw();
  }
}

function stroke(g, x0, y0, x1, y1) {
  g.beginPath();
  g.moveTo(x0, y0);
  g.lineTo(x1, y1);
  g.stroke();
}

const discs = new Map();
/** Pixels of a disc: dx, dy and coverage of each, flat. */
function discOf(radius) {
  let disc = discs.get(radius);
  if (!disc) {
    const cells = [];
    const reach = Math.ceil(radius);
    for (let dy = -reach; dy <= reach; dy++) {
      for (let dx = -reach; dx <= reach; dx++) {
        const cover = Math.min(1, radius + 0.5 - Math.hypot(dx, dy));
        if (cover > 0.05) cells.push(dx, dy, cover);
      }
    }
    disc = Float32Array.from(cells);
    discs.set(radius, disc);
  }
  return disc;
}
