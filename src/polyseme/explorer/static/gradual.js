// Long lists that are made anew many times a second: what is seen first is there at once, the
// rest within the next pictures.

import { h } from "./dom.js";

const FIRST = 6;
const BATCH = 8;

/** Fills an element with what functions make, little by little. */
export class Gradual {
  /** @param {HTMLElement} element @param {AbortSignal} signal */
  constructor(element, signal) {
    this.element = element;
    this.pending = [];
    this.frame = 0;
    this.height = 0;
    const observer = new ResizeObserver(() => {
      if (!this.pending.length) this.height = element.offsetHeight;
    });
    observer.observe(element);
    signal.addEventListener("abort", () => {
      observer.disconnect();
      cancelAnimationFrame(this.frame);
    });
  }

  /** @param {(() => Node)[]} makers */
  fill(makers) {
    // Meanwhile the page keeps its length, so that a reader who has scrolled stays in place.
    if (this.height) this.element.style.setProperty("min-height", `${this.height}px`);
    this.element.replaceChildren(...makers.slice(0, FIRST).map((make) => make()));
    this.pending = makers.slice(FIRST);
    this._next();
  }

  _next() {
    cancelAnimationFrame(this.frame);
    if (this.pending.length) this.frame = requestAnimationFrame(() => this._more(BATCH));
    else this.element.style.removeProperty("min-height");
  }

  _more(n) {
    this.element.append(...this.pending.splice(0, n).map((make) => make()));
    this._next();
  }

  /** Makes all that is still to come. */
  finish() {
    if (this.pending.length) this._more(this.pending.length);
  }
}

/**
 * A list of which the rest is made when it's asked for.
 *
 * @param {HTMLElement} list
 * @param {number[]} items
 * @param {(item: number) => Node} make
 * @returns {{more: HTMLElement, show: (n: number) => void}} a button for the rest, and the first n
 */
export function partly(list, items, make) {
  let shown = 0;
  const more = h("button", { type: "button", class: "link", onclick: () => show(items.length) }, `Show all ${items.length}`);
  function show(n) {
    list.append(...items.slice(shown, n).map(make));
    shown = Math.max(shown, n);
    more.hidden = shown >= items.length;
  }
  return { more, show };
}
