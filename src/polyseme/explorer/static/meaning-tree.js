// The tree of a neuron's meanings, which splits its examples by overlap. Pure functions of arrays.

import { arrange } from "./recut.js";

/**
 * A group of examples: one that an overlap splits, or one that none splits.
 *
 * @typedef {object} Group
 * @property {number} overlap above which it splits into its sides; 1 if it never does
 * @property {number} x position of its line, in examples from the left
 * @property {number} example that belongs to the group wherever the group is a meaning
 * @property {Group[]} sides the two groups that it splits into, or none
 */

/**
 * The groups that a tree can be cut into, as `polyseme.core.Meanings.cut` does: a merge is a split
 * if both of its sides have enough examples and overlap less than the threshold, as do the sides
 * of all splits above it. Smaller sides that come off are not groups, and split no other group.
 *
 * @param {{nodes: ArrayLike<number>, overlaps: ArrayLike<number>}} tree
 * @param {number} n number of examples
 * @param {number} smallest fewest examples of a side
 * @returns {{order: Int32Array, place: Float64Array, root: Group}} examples from left to right, and the position of each
 */
export function groupTree({ nodes, overlaps }, n, smallest) {
  const { order, x, sizes } = arrange({ nodes, heights: overlaps }, n);
  const first = Int32Array.from(x); // place of each node's leftmost example
  for (let merge = 0; merge < n - 1; merge++) first[n + merge] = Math.min(first[nodes[2 * merge]], first[nodes[2 * merge + 1]]);

  function grow(top, above) {
    let node = top;
    while (node >= n) {
      const sides = [nodes[2 * (node - n)], nodes[2 * (node - n) + 1]].sort((a, b) => sizes[b] - sizes[a]);
      if (sizes[sides[1]] >= smallest) {
        const overlap = Math.max(above, overlaps[node - n]);
        if (!(overlap < 1)) break;
        const grown = sides.map((side) => grow(side, overlap));
        return { overlap, x: (grown[0].x + grown[1].x) / 2, example: grown[0].example, sides: grown };
      }
      node = sides[0];
    }
    return { overlap: 1, x: first[top] + (sizes[top] - 1) / 2, example: order[first[node]], sides: [] };
  }
  return { order, place: x.subarray(0, n), root: grow(2 * n - 2, 0) };
}

/**
 * The lines of the tree at a cut, as corners (x, overlap): with an example of the group for groups
 * below the cut, with -1 above it.
 *
 * @param {Group} root
 * @param {number} threshold
 * @returns {{corners: [number, number][], example: number}[]}
 */
export function linesOf(root, threshold) {
  const lines = [];
  (function draw(group, above) {
    const { overlap, x, sides } = group;
    // Lines above the cut belong to several meanings.
    if (above < threshold) lines.push({ corners: [[x, above], [x, Math.min(threshold, overlap)]], example: -1 });
    if (overlap >= threshold) lines.push({ corners: [[x, Math.max(above, threshold)], [x, overlap]], example: group.example });
    if (sides.length) lines.push({ corners: sides.map((side) => [side.x, overlap]), example: overlap < threshold ? -1 : group.example });
    for (const side of sides) draw(side, overlap);
  })(root, 0);
  return lines;
}
