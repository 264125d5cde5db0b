// Two-dimensional maps of a neuron's examples, of neuron embeddings and of the raw inputs: one
// cluster of inputs may be several clusters of embeddings, and the other way round.

import { h, svg, redraw } from "./dom.js";
import { N_COLOURS, colourClass, shapeOf } from "./palette.js";
import { hideTip, showTip } from "./tip.js";

const REACH = 24; // largest distance from the pointer to an example, in pixels
const PAD = 14;

/**
 * @param {object} neuron as data.js has it
 * @param {object} options
 * @param {ArrayLike<number>} options.layout 2n coordinates
 * @param {string} options.title
 * @param {string} options.says a description, one sentence
 * @param {object} options.link see link.js
 * @param {AbortSignal} options.signal
 * @param {(example: number) => Node[]} options.tell what a tooltip shows of an example
 */
export function exampleMap(neuron, { layout, title, says, link, signal, tell }) {
  const marks = Array.from({ length: neuron.n }, () => svg("path", { class: "mark" }));
  const halo = svg("circle", { class: "halo", r: 10, hidden: true });
  const picture = svg("svg", { class: "example-map", role: "img", "aria-label": `${title}. ${says}` }, halo, ...marks.toReversed());
  const element = h("figure", { class: "map" }, h("figcaption", {}, h("strong", {}, title)), picture);
  const [xs, ys] = [0, 1].map((axis) => Array.from({ length: neuron.n }, (_, i) => layout[2 * i + axis]));
  let places = null;

  function draw() {
    const width = picture.clientWidth || element.clientWidth;
    if (!width) return;
    const height = Math.round(width * 0.8);
    const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    // One scale for both axes: these are distances.
    const scale = Math.min((width - 2 * PAD) / (right - left || 1), (height - 2 * PAD) / (high - low || 1));
    places = xs.map((x, i) => [
      width / 2 + (x - (left + right) / 2) * scale,
      height / 2 - (ys[i] - (low + high) / 2) * scale,
    ]);
    picture.setAttribute("height", height);
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    marks.forEach((mark, i) => mark.setAttribute("transform", `translate(${places[i][0].toFixed(1)} ${places[i][1].toFixed(1)}) scale(4.2)`));
  }
  redraw(element, signal, draw);

  function nearest(event) {
    if (!places) return null;
    const box = picture.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null;
    let reach = REACH ** 2;
    places.forEach(([px, py], i) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < reach) [best, reach] = [i, distance];
    });
    return best;
  }
  picture.addEventListener("pointermove", (event) => {
    const example = nearest(event);
    link.point(example);
    picture.classList.toggle("over", example !== null);
    if (example === null) hideTip();
    else showTip(event.clientX, event.clientY, tell(example));
  });
  picture.addEventListener("pointerleave", () => {
    link.point(null);
    hideTip();
  });
  picture.addEventListener("click", (event) => {
    const example = nearest(event);
    if (example !== null) link.choose(example);
  });
  link.onPoint(signal, (example) => {
    halo.toggleAttribute("hidden", example === null || !places);
    if (example === null || !places) return;
    halo.setAttribute("cx", places[example][0]);
    halo.setAttribute("cy", places[example][1]);
  });

  const shown = new Int8Array(neuron.n).fill(N_COLOURS + 1);
  return {
    element,
    show(cut, chosen) {
      marks.forEach((mark, i) => {
        const place = cut.place(i);
        const faded = chosen !== null && !isChosen(cut, i, chosen);
        const key = faded ? -2 - place : place;
        if (shown[i] === key) return;
        shown[i] = key;
        mark.setAttribute("d", shapeOf(place));
        mark.setAttribute("class", `mark ${colourClass(place)}${faded ? " faded" : ""}`);
      });
    },
  };
}

/** Whether an example belongs to the chosen feature: a number, or "singles". */
export function isChosen(cut, example, chosen) {
  const label = cut.labels[example];
  return String(label) === chosen || (chosen === "singles" && label >= cut.shared);
}
