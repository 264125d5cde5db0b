// Cuts a neuron's tree: pure functions of arrays, without the page.
//
// Labels equal those of `polyseme.core.clustering.cut_trees`: merges at distances below the
// threshold are made; clusters are numbered by size, largest first, and ties go to the cluster
// with the earlier example.

/**
 * @typedef {object} Tree
 * @property {Int32Array} nodes (2 (n - 1)): the two nodes of each merge; node n + m is merge m
 * @property {Float32Array} heights (n - 1): their distances, in ascending order
 */

/**
 * Cut a tree.
 *
 * @param {Tree} tree
 * @param {number} n number of examples
 * @param {number} threshold
 * @returns {Int32Array} (n): the cluster of each example
 */
export function cut(tree, n, threshold) {
  const { nodes, heights } = tree;
  const root = new Int32Array(Math.max(2 * n - 1, 0));
  for (let node = 0; node < root.length; node++) root[node] = node;
  // From the last merge down, so that a node's root is known before its children's.
  for (let merge = n - 2; merge >= 0; merge--) {
    if (heights[merge] >= threshold) continue;
    root[nodes[2 * merge]] = root[n + merge];
    root[nodes[2 * merge + 1]] = root[n + merge];
  }
  const sizes = new Int32Array(root.length);
  const seen = [];
  for (let example = 0; example < n; example++) {
    if (sizes[root[example]]++ === 0) seen.push(root[example]);
  }
  // Roots are in the order of their earliest example, and the sort is stable.
  seen.sort((a, b) => sizes[b] - sizes[a]);
  const rank = new Int32Array(root.length);
  seen.forEach((node, index) => (rank[node] = index));
  return root.slice(0, n).map((node) => rank[node]);
}

/**
 * A threshold that cuts a tree into about k clusters, exactly k if no distances tie, with the
 * fewest digits that do so.
 *
 * @param {Tree} tree
 * @param {number} n number of examples
 * @param {number} k from 2 to n - 1
 * @returns {number}
 */
export function thresholdFor(tree, n, k) {
  const { heights } = tree;
  const merges = n - k;
  const height = heights[merges];
  // Merges at the same distance are all made, or none.
  const before = heights.findIndex((other) => other === height);
  const after = heights.findLastIndex((other) => other === height) + 1;
  const fewer = height > 0 && merges - before <= after - merges;
  const [low, high] = fewer ? [heights[before - 1] ?? 0, height] : [height, heights[after] ?? 2];
  for (let scale = 10; scale < 1e8; scale *= 10) {
    const rounded = Math.floor(high * scale) / scale;
    if (rounded > low && rounded <= high) return rounded;
  }
  return high;
}

/**
 * The examples of each cluster, in their own order.
 *
 * @param {Int32Array} labels
 * @returns {number[][]}
 */
export function groups(labels) {
  const found = [];
  labels.forEach((label, example) => {
    while (found.length <= label) found.push([]);
    found[label].push(example);
  });
  return found;
}

/**
 * Where each node of a tree is drawn: leaves in an order in which no lines cross, the larger side
 * of each merge first.
 *
 * @param {Tree} tree
 * @param {number} n
 * @returns {{order: Int32Array, x: Float64Array, y: Float64Array, sizes: Int32Array}}
 *   examples from left to right; for each of the 2n - 1 nodes its position (in leaves), its height
 *   and the number of examples below it
 */
export function arrange(tree, n) {
  const { nodes, heights } = tree;
  const count = Math.max(2 * n - 1, 0);
  const sizes = new Int32Array(count).fill(1, 0, n);
  const y = new Float64Array(count);
  for (let merge = 0; merge < n - 1; merge++) {
    sizes[n + merge] = sizes[nodes[2 * merge]] + sizes[nodes[2 * merge + 1]];
    y[n + merge] = heights[merge];
  }
  const order = new Int32Array(n);
  const x = new Float64Array(count);
  const pending = count ? [count - 1] : [];
  let placed = 0;
  while (pending.length) {
    const node = pending.pop();
    if (node < n) {
      x[node] = placed;
      order[placed++] = node;
      continue;
    }
    const [a, b] = [nodes[2 * (node - n)], nodes[2 * (node - n) + 1]];
    if (sizes[b] > sizes[a]) pending.push(a, b);
    else pending.push(b, a);
  }
  for (let merge = 0; merge < n - 1; merge++) {
    x[n + merge] = (x[nodes[2 * merge]] + x[nodes[2 * merge + 1]]) / 2;
  }
  return { order, x, y, sizes };
}

/**
 * Mean distances within and between clusters at a cut of an average-linkage tree, whose
 * heights are means over the pairs that a merge joins.
 *
 * @param {Tree} tree
 * @param {number} n
 * @param {number} threshold
 * @returns {{within: number, between: number}} NaN if there are no such pairs
 */
export function distances(tree, n, threshold) {
  const { sizes } = arrange(tree, n);
  const sum = [0, 0];
  const pairs = [0, 0];
  for (let merge = 0; merge < n - 1; merge++) {
    const joined = sizes[tree.nodes[2 * merge]] * sizes[tree.nodes[2 * merge + 1]];
    const side = tree.heights[merge] < threshold ? 0 : 1;
    sum[side] += joined * tree.heights[merge];
    pairs[side] += joined;
  }
  return { within: sum[0] / pairs[0], between: sum[1] / pairs[1] };
}

/**
 * Tokens that are frequent in a cluster and rare in the neuron's others: class-based TF-IDF, as
 * in `polyseme.core.distinctive_tokens`.
 *
 * @param {ArrayLike<number>} tokens (n * width): windows, row by row; -1 beyond the context
 * @param {number} width
 * @param {number} centre which column of a window is the example's own token
 * @param {Int32Array} labels (n)
 * @param {number} k
 * @returns {number[][]} up to k tokens of each cluster, most distinctive first
 */
export function distinctive(tokens, width, centre, labels, k) {
  const counts = [];
  const frequency = new Map();
  labels.forEach((label, example) => {
    while (counts.length <= label) counts.push(new Map());
    for (let column = 0; column < width; column++) {
      const token = tokens[example * width + column];
      if (token < 0) continue;
      // The token that activates the neuron is more informative than those around it.
      const weight = column === centre ? width : 1;
      counts[label].set(token, (counts[label].get(token) ?? 0) + weight);
      frequency.set(token, (frequency.get(token) ?? 0) + weight);
    }
  });
  const sizes = counts.map((own) => [...own.values()].reduce((a, b) => a + b, 0));
  const mean = sizes.reduce((a, b) => a + b, 0) / Math.max(sizes.filter(Boolean).length, 1);
  return counts.map((own, label) => {
    const scored = [...own].map(([token, count]) => ({
      token,
      score: (count / sizes[label]) * Math.log1p(mean / frequency.get(token)),
    }));
    scored.sort((a, b) => b.score - a.score || a.token - b.token);
    return scored.slice(0, k).map(({ token }) => token);
  });
}
