// Arrays as pictures: pixels as they are, and signed quantities on a diverging scale centred on
// zero. One canvas pixel is one value; the browser enlarges it without smoothing.

import { colourParts, h } from "./dom.js";
import { number } from "./format.js";

/** @typedef {[number, number, number]} Shape height, width, channels */

/** @param {Shape} shape @param {string} label description for screen readers; "" if adjacent text describes it */
function blank([height, width], label) {
  const described = label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" };
  return h("canvas", { width, height, class: "pixels", ...described });
}

function paint(canvas, [height, width, channels], colourOf) {
  const context = canvas.getContext("2d");
  const picture = context.createImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) colourOf(pixel * channels, picture.data, 4 * pixel);
  context.putImageData(picture, 0, 0);
}

/**
 * An image as stored: grey, or red, green and blue.
 * @param {ArrayLike<number>} values 0 to 255, row by row, channels last
 */
export function pixels(values, shape, label = "") {
  const canvas = blank(shape, label);
  const colour = shape[2] >= 3;
  paint(canvas, shape, (at, data, to) => {
    for (let channel = 0; channel < 3; channel++) data[to + channel] = values[at + (colour ? channel : 0)];
    data[to + 3] = 255;
  });
  return canvas;
}

/**
 * A signed quantity, summed over channels, because each channel would need its own picture.
 * @param {number} [limit] magnitude with full colour; by default the largest
 */
export function signed(values, shape, label = "", limit = 0) {
  const canvas = blank(shape, label);
  const sums = channelSums(values, shape);
  const full = limit || largest(sums) || 1;
  const draw = () => {
    const [zero, above, below] = ["--zero", "--above", "--below"].map(colourParts);
    paint(canvas, [shape[0], shape[1], 1], (at, data, to) => {
      const end = sums[at] < 0 ? below : above;
      // The square root keeps small values apart from zero.
      const part = Math.min(1, Math.abs(sums[at]) / full) ** 0.75;
      for (let channel = 0; channel < 3; channel++) data[to + channel] = zero[channel] + (end[channel] - zero[channel]) * part;
      data[to + 3] = 255;
    });
  };
  draw();
  // A canvas that has left the page stops redrawing.
  const redraw = () => (canvas.isConnected ? draw() : window.removeEventListener("themechange", redraw));
  window.addEventListener("themechange", redraw);
  return canvas;
}

export function channelSums(values, [height, width, channels]) {
  const sums = new Float64Array(height * width);
  for (let i = 0; i < sums.length; i++) {
    for (let channel = 0; channel < channels; channel++) sums[i] += values[i * channels + channel];
  }
  return sums;
}

export function largest(values) {
  let most = 0;
  for (const value of values) most = Math.max(most, Math.abs(value));
  return most;
}

/** The scale of a signed picture. */
export function legend(limit) {
  return h("span", { class: "signed-legend" },
    h("span", {}, number(-limit, 2)), h("span", { class: "signed-bar", "aria-hidden": "true" }), h("span", {}, number(limit, 2)));
}

/**
 * From a stored pixel (0 to 255) to the model's input.
 * @param {object} image run.json's `image`
 * @param {number} channels
 * @returns {(value: number, channel: number) => number}
 */
export function toInput(image, channels) {
  if (image.float) return (value) => image.low + (value / 255) * (image.high - image.low);
  const each = (value) => Array.from({ length: channels }, (_, channel) => (Array.isArray(value) ? value[channel] : value));
  const [mean, std] = [each(image.mean), each(image.std)];
  return (value, channel) => (value / 255 - mean[channel]) / std[channel];
}

/** Mean of some thumbs, 0 to 255. @param {(i: number) => Uint8Array} thumb */
export function meanOf(thumb, examples, size) {
  const mean = new Float64Array(size);
  for (const example of examples) {
    const values = thumb(example);
    for (let i = 0; i < size; i++) mean[i] += values[i];
  }
  for (let i = 0; i < size; i++) mean[i] /= examples.length;
  return mean;
}

/** Elementwise product, as a new array. */
export function product(a, b) {
  return Float64Array.from(a, (value, i) => value * b[i]);
}
