// Where in an image a convolution fired: its positions are spread evenly over the image.

import { h } from "./dom.js";

export class Places {
  /**
   * @param {{grid: [number, number], covers: [number, number]}} convolution of run.json's site
   * @param {[number, number, number]} shape of an image
   */
  constructor({ grid, covers }, [height, width, channels]) {
    this.grid = grid;
    this.covers = covers;
    this.shape = [height, width, channels];
    /** Shape of the patch that the kernel covers. */
    this.part = [Math.max(1, Math.round(covers[0] * height)), Math.max(1, Math.round(covers[1] * width)), channels];
  }

  /** The place of a position, as shares of the image's height and width. */
  centre(position) {
    const [rows, columns] = this.grid;
    return [(Math.min(rows - 1, Math.floor(position / columns)) + 0.5) / rows, ((position % columns) + 0.5) / columns];
  }

  /** A frame to lay over an image. */
  mark(position) {
    const edges = this.centre(position).map((at, axis) => [Math.max(0, at - this.covers[axis] / 2), Math.min(1, at + this.covers[axis] / 2)]);
    const share = (value) => `${(100 * value).toFixed(1)}%`;
    const [[top, bottom], [left, right]] = edges;
    return h("span", { class: "place", "aria-hidden": "true", style: { top: share(top), left: share(left), height: share(bottom - top), width: share(right - left) } });
  }

  /** Mean of the patches under the kernel, ignoring what is beyond an image's edge. */
  average(thumb, members, position) {
    const [height, width, channels] = this.shape;
    const [tall, wide] = this.part;
    const sums = new Float64Array(tall * wide * channels);
    const counts = new Uint32Array(tall * wide);
    for (const example of members) {
      const values = thumb(example);
      const [down, across] = this.centre(position[example]);
      const [top, left] = [Math.round(down * height - tall / 2), Math.round(across * width - wide / 2)];
      for (let r = Math.max(0, -top); r < Math.min(tall, height - top); r++) {
        for (let c = Math.max(0, -left); c < Math.min(wide, width - left); c++) {
          counts[r * wide + c] += 1;
          for (let channel = 0; channel < channels; channel++) {
            sums[(r * wide + c) * channels + channel] += values[((top + r) * width + left + c) * channels + channel];
          }
        }
      }
    }
    return sums.map((sum, i) => sum / Math.max(1, counts[Math.floor(i / channels)]));
  }

  /** How many examples lie at each position. */
  counts(members, position) {
    const counts = new Float64Array(this.grid[0] * this.grid[1]);
    for (const example of members) if (position[example] < counts.length) counts[position[example]] += 1;
    return counts;
  }
}
