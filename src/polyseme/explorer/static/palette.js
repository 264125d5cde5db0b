// Features are told apart by colour, shape and number, so that no reader needs all three. The
// colours are in neuron.css, for both themes, and are distinct under common colour blindness.
// Features after the eighth, and single examples, are grey.

import { h, svg } from "./dom.js";

export const N_COLOURS = 8;

// Outlines within a circle of radius 1, of about equal area.
const SHAPES = [
  "M-.9 0A.9 .9 0 1 0 .9 0A.9 .9 0 1 0 -.9 0Z", // circle
  "M-.8 -.8H.8V.8H-.8Z", // square
  "M0 -1.05L1 .8H-1Z", // triangle
  "M0 -1.15L1.05 0L0 1.15L-1.05 0Z", // diamond
  "M0 1.05L1 -.8H-1Z", // triangle, down
  "M-.33 -1H.33V-.33H1V.33H.33V1H-.33V.33H-1V-.33H-.33Z", // plus
  "M0 -1.1L1.05 -.34L.65 .89H-.65L-1.05 -.34Z", // pentagon
  "M-.53 -1L0 -.47L.53 -1L1 -.53L.47 0L1 .53L.53 1L0 .47L-.53 1L-1 .53L-.47 0L-1 -.53Z", // cross
];
const REST = "M-.6 0A.6 .6 0 1 0 .6 0A.6 .6 0 1 0 -.6 0Z";

/** A feature's place in the palette, or -1 for grey. */
export function paletteOf(feature, size) {
  return size > 1 && feature < N_COLOURS ? feature : -1;
}

/** Class that sets `--c`, the feature's colour. */
export function colourClass(place) {
  return place < 0 ? "f-rest" : `f${place}`;
}

/** Path of a feature's shape, of radius 1 about the origin. */
export function shapeOf(place) {
  return place < 0 ? REST : SHAPES[place];
}

/** A feature's mark, for use in text. */
export function marker(place) {
  return svg(
    "svg",
    { class: `marker ${colourClass(place)}`, viewBox: "-1.3 -1.3 2.6 2.6", "aria-hidden": "true" },
    svg("path", { d: shapeOf(place) }),
  );
}

/** A feature's mark and number. */
export function badge(feature, place) {
  return h("span", { class: `badge ${colourClass(place)}` }, marker(place), h("b", {}, feature));
}
