// A tree of examples with the threshold that cuts it. The reader drags the line, taps a height, or
// uses the slider and the field below.

import { count, number } from "./format.js";
import { h, replace, svg, redraw, uniqueId } from "./dom.js";
import { groupTree, linesOf } from "./meaning-tree.js";
import { arrange, thresholdFor } from "./recut.js";
import { N_COLOURS, colourClass, paletteOf } from "./palette.js";

const HEIGHT = 208;
const MARGIN = { left: 38, right: 10, top: 10, bottom: 30 };
const COUNTS = [5, 10, 20];

/**
 * What is drawn, and how it is cut.
 *
 * @typedef {object} Plan
 * @property {string} name of the threshold
 * @property {string} noun what a cut produces
 * @property {number} own the run's own threshold
 * @property {number} most the largest threshold
 * @property {number} step between thresholds that can be dragged to
 * @property {[number, number]} ends thresholds at the bottom and the top of the picture
 * @property {Int32Array} order examples from left to right
 * @property {ArrayLike<number>} place where each example is, from the left
 * @property {(threshold: number) => {corners: [number, number][], example: number}[]} lines
 *   corners (place, threshold) of lines, each with an example of its group, or -1 above the cut
 * @property {[number, number][]} counts buttons: an approximate number, and the threshold that produces it
 */

/** The tree of features, by distance. @returns {Plan} */
export function featurePlan({ tree, n, site }) {
  const { nodes, heights } = tree;
  const { order, x, y } = arrange(tree, n);
  const leaf = someLeaf(tree, n);
  const own = site.threshold;
  const highest = Math.max(heights.at(-1), own);
  return {
    name: "Threshold",
    noun: "feature",
    own,
    most: 2,
    step: 0.001,
    ends: [0, Math.min(2, Number((Math.max(highest * 1.08, 0.01)).toFixed(3)))],
    order,
    place: x,
    lines: (threshold) => Array.from(heights, (height, merge) => {
      const [a, b] = [nodes[2 * merge], nodes[2 * merge + 1]];
      return { corners: [[x[a], y[a]], [x[a], height], [x[b], height], [x[b], y[b]]], example: height >= threshold ? -1 : leaf[merge] };
    }),
    counts: COUNTS.filter((k) => k < n).map((k) => [k, thresholdFor(tree, n, k)]),
  };
}

/** The tree of meanings, by overlap: the first split is at the top. @returns {Plan} */
export function meaningPlan({ meaningTree, n, run }) {
  const { overlap: own, smallest } = run.meaning_cut;
  const { order, place, root } = groupTree(meaningTree, n, smallest);
  return {
    name: "Overlap",
    noun: "meaning",
    own,
    most: 1,
    step: 0.01,
    ends: [1, 0],
    order,
    place,
    lines: (threshold) => linesOf(root, threshold),
    counts: [],
  };
}

/**
 * @param {Plan} plan
 * @param {object} options
 * @param {AbortSignal} options.signal
 * @param {EventTarget} options.link see link.js
 * @param {(threshold: number, settled: boolean) => void} options.onThreshold `settled` when a
 *   drag has ended
 * @returns {{element: HTMLElement, show: (cut: import("./cut.js").Cut, chosen: ?string, fixed: boolean) => void}}
 */
export function dendrogram(plan, { signal, link, onThreshold }) {
  const { name, noun, own, most, step, ends } = plan;
  const n = plan.order.length;
  const top = Math.max(...ends);
  let cut = null;
  let fixed = false; // whether the cut is fixed
  let scale = null;

  const lines = classes().map((name) => svg("path", { class: `branch ${name}` }));
  const strips = classes().map((name) => svg("path", { class: `strip ${name}` }));
  const axis = svg("g", { class: "axis" });
  const numbers = svg("g", { class: "leaf-numbers" });
  const ownLine = svg("line", { class: "own-cut" });
  const pointed = svg("rect", { class: "pointed", hidden: true });
  const grip = svg("g", { class: "grip" },
    svg("rect", { class: "grip-zone" }),
    svg("line", {}),
    svg("rect", { class: "grip-knob", rx: 8, width: 44, height: 16, y: -8 }),
    svg("text", { y: 4, "text-anchor": "middle" }),
  );
  const picture = svg("svg", { class: "dendrogram", height: HEIGHT, "aria-hidden": "true" },
    axis, pointed, ...lines, ...strips, numbers, ownLine, grip);

  const id = uniqueId("threshold");
  const slider = h("input", { type: "range", id, min: step, max: top, step });
  const field = h("input", { type: "number", min: step, max: most, step: "any", "aria-label": `Exact ${name.toLowerCase()}` });
  const readout = h("output", { class: "readout", for: id });
  const fewer = plan.counts.map(([k, threshold]) =>
    h("button", { type: "button", "aria-label": `About ${k} ${noun}s`, onclick: () => onThreshold(threshold, true) }, k));
  const reset = h("button", { type: "button", class: "link" }, `Back to the run’s own cut, ${own}`);
  const element = h("div", { class: "cutter" },
    picture,
    h("div", { class: "cutter-controls" },
      h("label", { for: id }, name), slider, field),
    fewer.length > 0 && h("p", { class: "cutter-counts", role: "group", "aria-label": `Number of ${noun}s` }, "About ", fewer, ` ${noun}s`),
    h("p", { class: "cutter-said" }, readout, " ", reset),
  );

  slider.addEventListener("input", () => onThreshold(Number(slider.value), false));
  slider.addEventListener("change", () => onThreshold(Number(slider.value), true));
  field.addEventListener("change", () => {
    const value = Number(field.value);
    if (value > 0 && value <= most) onThreshold(value, true);
    else field.value = cut.threshold;
  });
  reset.addEventListener("click", () => {
    onThreshold(own, true);
    slider.focus();
  });

  let dragging = false;
  const at = (event) => {
    const y = event.clientY - picture.getBoundingClientRect().top;
    const value = ends[0] + ((scale.bottom - y) / (scale.bottom - MARGIN.top)) * (ends[1] - ends[0]);
    const rounded = Math.round(value / step) * step;
    return Number(Math.min(top, Math.max(step, rounded)).toFixed(3));
  };
  picture.addEventListener("pointerdown", (event) => {
    const onGrip = grip.contains(event.target);
    // A touch that starts elsewhere may be scrolling the page.
    if (fixed || event.button !== 0 || (event.pointerType === "touch" && !onGrip)) return;
    dragging = true;
    picture.setPointerCapture(event.pointerId);
    picture.classList.add("dragging");
    event.preventDefault();
    onThreshold(at(event), false);
  });
  picture.addEventListener("pointermove", (event) => {
    if (dragging) onThreshold(at(event), false);
    else if (scale) link.point(leafAt(event));
  });
  const end = (event) => {
    if (!dragging) return;
    dragging = false;
    picture.classList.remove("dragging");
    onThreshold(event.type === "pointercancel" ? cut.threshold : at(event), true);
  };
  picture.addEventListener("pointerup", end);
  picture.addEventListener("pointercancel", end);
  picture.addEventListener("pointerleave", () => !dragging && link.point(null));
  picture.addEventListener("click", (event) => {
    if (!fixed && event.pointerType === "touch" && event.offsetY < scale.bottom) onThreshold(at(event), true);
  });
  link.onPoint(signal, (example) => {
    pointed.toggleAttribute("hidden", example === null || !scale);
    if (example !== null && scale) set(pointed, { x: scale.x(plan.place[example] - 0.5) });
  });

  function leafAt(event) {
    const box = picture.getBoundingClientRect();
    const place = Math.floor((event.clientX - box.left - MARGIN.left) / scale.each);
    return place >= 0 && place < n ? plan.order[place] : null;
  }

  /** Draws what depends only on the width. */
  function draw() {
    const width = element.clientWidth;
    if (!width) return;
    const each = (width - MARGIN.left - MARGIN.right) / n;
    const bottom = HEIGHT - MARGIN.bottom;
    const x = (place) => MARGIN.left + (place + 0.5) * each;
    const y = (value) => bottom - ((value - ends[0]) / (ends[1] - ends[0])) * (bottom - MARGIN.top);
    scale = { width, each, bottom, x, y };
    set(picture, { width, viewBox: `0 0 ${width} ${HEIGHT}` });
    set(pointed, { y: MARGIN.top, width: Math.max(each, 2), height: bottom - MARGIN.top + 10 });
    set(ownLine, { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(own), y2: y(own) });
    set(grip.children[0], { x: MARGIN.left, y: -12, width: width - MARGIN.left, height: 24 });
    set(grip.children[1], { x1: MARGIN.left, x2: width - MARGIN.right });
    set(grip.children[2], { x: width - MARGIN.right - 44 });
    set(grip.children[3], { x: width - MARGIN.right - 22 });
    replace(axis, ticks(top).map((value) => [
      svg("line", { x1: MARGIN.left - 4, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
      svg("text", { x: MARGIN.left - 7, y: y(value) + 3.5, "text-anchor": "end" }, String(value)),
    ]));
    if (cut) paint();
  }

  /** Draws what depends on the cut. */
  function paint() {
    const { labels, features, threshold } = cut;
    const places = features.map((members, f) => paletteOf(f, noun === "meaning" ? 2 : members.length));
    const made = lines.map(() => []);
    // The last class is for branches above the cut.
    for (const { corners, example } of plan.lines(threshold)) {
      const path = corners.map(([x, y]) => `${scale.x(x).toFixed(1)} ${scale.y(y).toFixed(1)}`).join("L");
      made[example < 0 ? N_COLOURS + 1 : slot(places[labels[example]])].push(`M${path}`);
    }
    lines.forEach((path, i) => path.setAttribute("d", made[i].join("")));

    const marks = strips.map(() => []);
    const spans = new Map();
    const wide = Math.max(scale.each - (scale.each > 6 ? 1 : 0), 0.8).toFixed(2);
    plan.order.forEach((example, place) => {
      const left = (MARGIN.left + place * scale.each).toFixed(2);
      marks[slot(places[labels[example]])].push(`M${left} ${scale.bottom + 3}h${wide}v7h-${wide}Z`);
      const span = spans.get(labels[example]) ?? { from: place, to: place };
      span.to = place;
      spans.set(labels[example], span);
    });
    strips.forEach((path, i) => path.setAttribute("d", marks[i].join("")));
    replace(numbers, [...spans].map(([feature, { from, to }]) => {
      const room = (to - from + 1) * scale.each;
      if (to === from || room < 6 + 6 * String(feature).length) return null;
      return svg("text", { x: scale.x((from + to) / 2), y: scale.bottom + 22, "text-anchor": "middle" }, feature);
    }));
    grip.setAttribute("transform", `translate(0 ${scale.y(Math.min(threshold, top)).toFixed(1)})`);
    grip.children[3].textContent = threshold.toFixed(step < 0.01 ? 3 : 2);
  }

  redraw(element, signal, draw);

  return {
    element,
    show(next, chosen, isFixed = false) {
      cut = next;
      fixed = isFixed;
      for (const input of [slider, field]) input.disabled = fixed;
      picture.classList.toggle("fixed", fixed);
      const shown = chosen === null ? -1 : slot(paletteOf(Number(chosen), cut.features[chosen]?.length ?? 1));
      [lines, strips].forEach((paths) => paths.forEach((path, i) => path.classList.toggle("faded", shown >= 0 && i !== shown)));
      const said = `${count(cut.n, noun)} at ${number(cut.threshold)}`;
      slider.value = cut.threshold;
      slider.setAttribute("aria-valuetext", said);
      if (document.activeElement !== field || Number(field.value) !== cut.threshold) field.value = cut.threshold;
      const single = cut.n - cut.shared;
      readout.textContent = single && cut.shared
        ? `${count(cut.n, noun)}, ${single} of them ${single === 1 ? "a single example" : "single examples"}.`
        : `${count(cut.n, noun)}.`;
      reset.hidden = cut.own;
      if (scale) paint();
      else draw();
    },
  };
}

function classes() {
  return [...Array.from({ length: N_COLOURS }, (_, place) => colourClass(place)), colourClass(-1), "above"];
}

function slot(place) {
  return place < 0 ? N_COLOURS : place;
}

/** For each merge, one of the examples below it. */
function someLeaf(tree, n) {
  const found = new Int32Array(Math.max(n - 1, 0));
  for (let merge = 0; merge < n - 1; merge++) {
    const child = tree.nodes[2 * merge];
    found[merge] = child < n ? child : found[child - n];
  }
  return found;
}

function ticks(top) {
  const step = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((s) => top / s <= 5) ?? 1;
  return Array.from({ length: Math.floor(top / step + 1e-9) + 1 }, (_, i) => Number((i * step).toFixed(3)));
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}
