// Long lists that are rebuilt many times a second: the first items appear at once, the rest in
// the next frames.

import { h } from "./dom.js";

const FIRST = 6;
const BATCH = 8;

/** Fills an element step by step with the nodes that functions create. */
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
    // Keep the page's height meanwhile, so that the scroll position doesn't jump.
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

  /** Creates everything that is still pending. */
  finish() {
    if (this.pending.length) this._more(this.pending.length);
  }
}

/**
 * A list whose remaining items are created on request.
 *
 * @param {HTMLElement} list
 * @param {number[]} items
 * @param {(item: number) => Node} make
 * @returns {{more: HTMLElement, show: (n: number) => void}} a button that shows the rest, and a function that shows the first n
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
