// An image that the reader draws, at the resolution that the model reads.

import { h } from "./dom.js";
import { pixels } from "./images.js";

/**
 * @param {[number, number, number]} shape height, width, channels
 * @param {() => void} onDraw called when a stroke has changed
 */
export class Sketch {
  constructor(shape, onDraw) {
    [this.height, this.width, this.channels] = shape;
    this.shape = shape;
    this.values = new Float64Array(this.height * this.width * this.channels); // 0 to 1
    this.erasing = false;
    // A stroke of a written digit is about a tenth of the image wide.
    this.radius = Math.max(0.9, 0.055 * Math.max(this.height, this.width));
    this.canvas = pixels(this.values, shape);
    this.canvas.classList.add("sketch");
    this.canvas.setAttribute("role", "img");
    this.canvas.removeAttribute("aria-hidden");
    this.canvas.setAttribute("aria-label", "Drawing area for mouse, pen or touch; you can also choose an input of the run");
    this.onDraw = onDraw;
    this._listen();
  }

  get empty() {
    return this.values.every((value) => value === 0);
  }

  clear() {
    this.values.fill(0);
    this.paint();
  }

  /** @param {ArrayLike<number>} values 0 to 1 */
  set(values) {
    this.values.set(values);
    this.paint();
  }

  paint() {
    const painted = pixels(Float64Array.from(this.values, (value) => value * 255), this.shape);
    this.canvas.getContext("2d").drawImage(painted, 0, 0);
  }

  _listen() {
    const { canvas } = this;
    let last = null;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * this.width, ((event.clientY - box.top) / box.height) * this.height];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      canvas.setPointerCapture(event.pointerId);
      last = place(event);
      this._stroke(last, last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      const events = event.getCoalescedEvents?.() ?? [];
      for (const one of events.length ? events : [event]) {
        const next = place(one);
        this._stroke(last, next);
        last = next;
      }
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (last = null));
  }

  /** Draws a stroke with a soft edge. */
  _stroke([x0, y0], [x1, y1]) {
    const length2 = (x1 - x0) ** 2 + (y1 - y0) ** 2;
    for (let row = 0; row < this.height; row++) {
      for (let column = 0; column < this.width; column++) {
        const [x, y] = [column + 0.5, row + 0.5];
        const along = length2 ? Math.max(0, Math.min(1, ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length2)) : 0;
        const distance = Math.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0));
        const ink = Math.max(0, Math.min(1, this.radius + 0.5 - distance));
        for (let channel = 0; channel < this.channels; channel++) {
          const at = (row * this.width + column) * this.channels + channel;
          this.values[at] = this.erasing ? Math.min(this.values[at], 1 - ink) : Math.max(this.values[at], ink);
        }
      }
    }
    this.paint();
    this.onDraw();
  }
}

/** The buttons of a sketch. */
export function sketchTools(sketch, onClear) {
  const erase = h("button", { type: "button", "aria-pressed": "false", onclick: () => {
    sketch.erasing = !sketch.erasing;
    erase.setAttribute("aria-pressed", String(sketch.erasing));
  } }, "Erase");
  const clear = h("button", { type: "button", onclick: () => {
    sketch.clear();
    onClear();
  } }, "Clear");
  return [erase, clear];
}
