// Creates elements. Every string from a run is untrusted, so text only ever becomes a text node:
// nothing in the explorer parses markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An HTML element.
 *
 * `attributes`: strings and numbers become attributes, `true` an empty one, `false`, null and
 * undefined none; functions under `on...` become listeners; `style` is an object of CSS
 * properties (set through the object model: the page's policy forbids style attributes);
 * `dataset` an object.
 * `children`: nodes, strings, numbers, nested arrays of them; null, undefined and false are skipped.
 * @returns {HTMLElement}
 */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. @returns {SVGElement} */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2).toLowerCase(), value);
    else if (name === "style") {
      for (const [property, v] of Object.entries(value)) element.style.setProperty(property, v);
    } else if (name === "dataset") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) add(element, child);
    else element.append(child instanceof Node ? child : String(child));
  }
}

/** Replaces the children of an element. */
export function replace(element, ...children) {
  element.replaceChildren();
  add(element, children);
  return element;
}

let counter = 0;
/** An id that no other element of the page has. */
export function uniqueId(prefix = "id") {
  counter += 1;
  return `${prefix}-${counter}`;
}

let probe = null;
/**
 * The current value of a colour variable, as "rgb(r, g, b)", for drawing on a canvas.
 * Redraw on the window's "themechange" event.
 */
export function colour(variable) {
  if (!probe) {
    probe = h("span", { class: "visually-hidden", "aria-hidden": "true" });
    document.body.append(probe);
  }
  probe.style.setProperty("color", `var(${variable})`);
  return getComputedStyle(probe).color;
}

/** The same as [r, g, b], 0 to 255. */
export function colourParts(variable) {
  return (colour(variable).match(/[\d.]+/g) ?? [0, 0, 0]).slice(0, 3).map(Number);
}

/** Calls `draw` now, whenever `element` changes its width, and whenever the theme changes, until `signal` aborts. */
export function redraw(element, signal, draw) {
  let width = -1;
  const observer = new ResizeObserver(() => {
    const now = element.clientWidth;
    if (now === width || now === 0) return;
    width = now;
    draw();
  });
  observer.observe(element);
  window.addEventListener("themechange", draw, { signal });
  signal.addEventListener("abort", () => observer.disconnect());
}
