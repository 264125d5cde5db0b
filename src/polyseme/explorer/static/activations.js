// How strongly inputs activate a neuron: a histogram over all of them and, below it, the positions
// of the examples, by feature or by meaning.

import { count, number, whole } from "./format.js";
import { h, replace, svg, redraw } from "./dom.js";
import { asTable } from "./charts.js";
import { isChosen } from "./feature-map.js";
import { N_COLOURS, colourClass, paletteOf } from "./palette.js";
import { Scale, tickText } from "./scale.js";
import { hideTip, showTip } from "./tip.js";

const BARS = 104;
const LANE = 12;
const MARGIN = { left: 40, right: 12, top: 8 };
const AXIS = 20;

/** The histogram without its empty last bins: its range doubles as inputs are read. */
function occupied({ counts, upper }) {
  const end = Math.max(1, counts.findLastIndex((n) => n > 0) + 1);
  return { counts: counts.subarray(0, end), upper: (upper * end) / counts.length };
}

/**
 * @param {object} neuron as data.js has it, with a histogram
 * @param {object} options
 * @param {object} options.link see link.js
 * @param {AbortSignal} options.signal
 */
export function activations(neuron, { link, signal }) {
  const { counts, upper } = occupied(neuron.histogram);
  const total = counts.reduce((a, b) => a + b, 0);
  const inputs = neuron.run.kind === "text" ? "context" : "input";
  const bars = svg("g", { class: "bars" });
  const axis = svg("g", { class: "axis" });
  const lanes = svg("g", { class: "lanes" });
  const pointer = svg("line", { class: "pointed-line", hidden: true });
  const picture = svg("svg", {
    class: "activations", role: "img",
    "aria-label": `Activations of ${count(total, inputs)}, up to ${number(upper)}`,
  }, bars, axis, lanes, pointer);
  const box = h("div", { class: "chart" }, picture);
  const element = h("div", {}, box,
    h("p", { class: "quiet-text small" }, `Activated by ${count(total, inputs)}; counts are on a logarithmic scale.${neuron.examples.activation ? " Below: the examples, one lane per group." : ""}`),
    asTable(["From", "to", "count"], () =>
      Array.from(counts, (n, bin) => [number((bin * upper) / counts.length), number(((bin + 1) * upper) / counts.length), whole(n)])));
  let x = null;
  let width = 0; // of the picture: asking for it amid a re-cut would lay the page out each time
  let state = null;

  function draw() {
    width = box.clientWidth;
    if (!width) return;
    x = new Scale(0, upper, MARGIN.left, width - MARGIN.right);
    const most = Math.max(2, ...counts);
    const y = (n) => MARGIN.top + BARS * (1 - Math.log(n + 0.3) / Math.log(most + 0.3) * 0.93 - 0.07);
    const each = (x.at(upper) - x.at(0)) / counts.length;
    replace(bars, Array.from(counts, (n, bin) =>
      n > 0 && svg("rect", { x: x.at(0) + bin * each, y: y(n), width: Math.max(each - (each > 3 ? 1 : 0), 0.7), height: MARGIN.top + BARS - y(n) })));
    const powers = [1, 10, 100, 1000, 10_000, 100_000, 1e6, 1e7].filter((n) => n <= most);
    replace(axis,
      powers.map((n) => [
        svg("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(n), y2: y(n) }),
        svg("text", { x: MARGIN.left - 6, y: y(n) + 4, "text-anchor": "end" }, n >= 1e6 ? `${n / 1e6}M` : n >= 1000 ? `${n / 1000}k` : n),
      ]),
      x.ticks(Math.max(2, Math.floor(width / 80))).map((value) =>
        svg("text", { x: x.at(value), y: MARGIN.top + BARS + 15, "text-anchor": "middle" }, tickText(value))));
    picture.setAttribute("width", width);
    stretch(MARGIN.top + BARS + AXIS);
    if (state) paint();
  }

  function paint() {
    const { cut, chosen } = state;
    const { activation } = neuron.examples;
    if (!activation) return; // damaged
    const rows = [];
    const laned = Math.min(cut.shared, N_COLOURS);
    for (let feature = 0; feature < laned; feature++) rows.push({ name: String(feature), place: paletteOf(feature, 2), members: cut.features[feature] });
    const rest = cut.features.slice(laned).flat();
    if (rest.length) rows.push({ name: "other", place: -1, members: rest });
    const first = MARGIN.top + BARS + AXIS + 4;
    replace(lanes, rows.map(({ name, place, members }, row) => {
      const top = first + row * LANE;
      const ticks = members.map((example) => `M${x.at(activation[example]).toFixed(1)} ${top}v${LANE - 3}`).join("");
      const faded = chosen !== null && !isChosen(cut, members[0], chosen);
      return svg("g", { class: `${colourClass(place)}${faded ? " faded" : ""}` },
        svg("text", { x: MARGIN.left - 6, y: top + 8.5, "text-anchor": "end" }, name),
        svg("line", { class: "lane", x1: MARGIN.left, x2: x.at(upper), y1: top + (LANE - 3) / 2, y2: top + (LANE - 3) / 2 }),
        svg("path", { class: "ticks", d: ticks }));
    }));
    stretch(first + rows.length * LANE + 2);
  }

  function stretch(height) {
    picture.setAttribute("height", height);
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    pointer.setAttribute("y1", MARGIN.top);
    pointer.setAttribute("y2", height);
  }
  redraw(box, signal, draw);

  picture.addEventListener("pointermove", (event) => {
    if (!x) return;
    const at = event.clientX - picture.getBoundingClientRect().left;
    const bin = Math.floor(((at - x.at(0)) / (x.at(upper) - x.at(0))) * counts.length);
    if (bin < 0 || bin >= counts.length) return hideTip();
    const [from, to] = [bin, bin + 1].map((edge) => number((edge * upper) / counts.length));
    showTip(event.clientX, event.clientY, h("strong", {}, `${from} to ${to}`), ` ${count(counts[bin], inputs)}`);
  });
  picture.addEventListener("pointerleave", hideTip);
  link.onPoint(signal, (example) => {
    const known = example !== null && x !== null && neuron.examples.activation !== null;
    pointer.toggleAttribute("hidden", !known);
    if (!known) return;
    const at = x.at(neuron.examples.activation[example]);
    pointer.setAttribute("x1", at);
    pointer.setAttribute("x2", at);
  });

  return {
    element,
    show(cut, chosen) {
      state = { cut, chosen };
      if (x) paint();
    },
  };
}
