// Loads all data that the pages show: fetched once, and cached while there's room.
// The same addresses exist on the live server and in a static export.

import { setMetrics } from "./metrics.js";
import { Tensors } from "./safetensors.js";

const KEPT_BYTES = 96 * 2 ** 20;

/** Address -> {promise, bytes}, least recently used first. */
const cache = new Map();

/** A failed request, with a message for the reader. */
export class DataError extends Error {}

/** Whether the pages come from the live server, not from static files. */
export const LIVE = document.querySelector('meta[name="polyseme-live"]') !== null;

/** Shown when nothing answers. */
export const UNREACHABLE = LIVE
  ? "The explorer’s server has stopped. Start it again with “polyseme explore”, and open the address that it prints."
  : "The web server doesn’t answer. Check that it is running and reachable, then reload the page.";

async function load(path, decode) {
  const known = cache.get(path);
  if (known) {
    cache.delete(path);
    cache.set(path, known);
    return known.promise;
  }
  const entry = { bytes: 0, promise: null };
  entry.promise = request(path).then(async (response) => {
    const { value, bytes } = await decode(response);
    entry.bytes = bytes;
    evict();
    return value;
  });
  entry.promise.catch(() => cache.delete(path)); // so that the next visit retries
  cache.set(path, entry);
  return entry.promise;
}

async function request(path) {
  let response;
  try {
    response = await fetch(path);
  } catch {
    throw new DataError(UNREACHABLE);
  }
  if (response.ok) return response;
  let reason = "";
  try {
    // The server reports damage as {"error": "..."}.
    reason = (await response.json()).error ?? "";
  } catch {
    // A static host sends its own error page.
  }
  throw new DataError(reason || `${path} couldn't be fetched: the server answered ${response.status}.`);
}

function evict() {
  let total = 0;
  for (const { bytes } of cache.values()) total += bytes;
  for (const [path, { bytes }] of cache) {
    if (total <= KEPT_BYTES) break;
    if (bytes === 0) continue; // still loading
    cache.delete(path);
    total -= bytes;
  }
}

/** A JSON file below data/. */
export function json(path) {
  return load(`data/${path}`, async (response) => {
    const text = await response.text();
    return { value: JSON.parse(text), bytes: text.length };
  });
}

/** A safetensors file below data/. @returns {Promise<Tensors>} */
export function tensors(path) {
  return load(`data/${path}`, async (response) => {
    const buffer = await unpacked(await response.arrayBuffer());
    return { value: new Tensors(buffer), bytes: buffer.byteLength };
  });
}

/** The uncompressed bytes: large files are stored gzipped, so that any static host sends them compressed. */
async function unpacked(buffer) {
  const [first, second] = new Uint8Array(buffer, 0, Math.min(2, buffer.byteLength));
  if (first !== 0x1f || second !== 0x8b) return buffer;
  return new Response(new Blob([buffer]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

// ------------------------------------------------------------------------------------- runs

/** The runs that this explorer shows, in brief. @returns {Promise<{title: string, kind: string}[]>} */
export async function runs() {
  const { runs, columns } = await json("runs.json");
  setMetrics(columns);
  return runs;
}

/**
 * Whether the files of a run are unchanged; resolves when the check is done.
 * @returns {Promise<{state: "verified" | "altered", files: string[]}>}
 */
export async function verified(run) {
  for (;;) {
    // Not cached: the answer changes when the check is done.
    const answer = await (await request(`data/${run.index}/verified.json`)).json();
    if (answer.state !== "checking") return answer;
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

/** Index of run `index`: its run.json, and `index` itself. */
export async function run(index) {
  return { ...(await json(`${index}/run.json`)), index };
}

/** Global row of a neuron, or -1 if the run has no such neuron. `site` is the site's number. */
export function rowOf(run, site, neuron) {
  const found = run.sites.find((s) => s.number === site);
  return found && Number.isInteger(neuron) && neuron >= 0 && neuron < found.n_neurons ? found.first + neuron : -1;
}

/** The site and number of the neuron in a global row. */
export function neuronOf(run, row) {
  const site = run.sites.find((s) => row >= s.first && row < s.first + s.n_neurons);
  return { site, neuron: row - site.first };
}

/**
 * The table of neurons, by global row.
 * @returns {Promise<{n: number, names: string[], column: (name: string) => ArrayLike<number>, has: (name: string) => boolean}>}
 */
export async function neurons(run) {
  const file = await tensors(`${run.index}/neurons.safetensors`);
  return {
    n: file.shape("neuron")[0],
    names: file.names,
    has: (name) => file.has(name),
    column: (name) => file.array(name),
  };
}

// --------------------------------------------------------------------------------- one neuron

/**
 * Everything about the neuron in a global row. Any array may be null: not in the run, or damaged.
 *
 * - `run`, `row`, `site` (entry of run.sites), `neuron`, `metrics` (name -> number)
 * - `damage`: sentences about what can't be read
 * - `n` examples; `nFeatures`; `labels` and `medoids` (example numbers), one per feature at the run's own cut
 * - `examples`: `input`, `inputNumber`, `position`, `activation`, `feature`, `meaning`, each of length n
 *   (images also `thumb`, `class`)
 * - `tree`: `nodes` (2(n-1)), `heights` (n-1); `meaningTree`: `nodes`, `overlaps` (n-1), or null
 * - `layout`, `layoutInput`: 2n coordinates, or null
 * - `histogram`: {counts, upper}, or null
 * - `tokens` (texts): {width, before, vocabulary, window (n × width) | null, shares | null, importances | null}
 * - `random`: {n, input, position, activation, tokens | thumb}
 * - `promoted`, `suppressed`: [{token, logit}], or null
 * - `similar`: a list for each feature of {site, neuron, feature, similarity, tokens}, or null
 * - `image`: {shapeOf(name), weights, kernel, activationMap, average, logitGradient, logitAblation, embedding}, each
 *   null if the run lacks it; `thumbs`: {shape: [h, w, c], of(i) -> Uint8Array}
 */
export async function neuron(run, row) {
  const { site, neuron } = neuronOf(run, row);
  const pack = await packOf(run, site, neuron);
  const at = neuron % run.pack;
  const n = pack.counts[at];
  const first = pack.firstExample[at];
  const examples = (name) => pack.slice(name, first, n);
  const nFeatures = pack.featureCounts[at];
  const firstFeature = pack.firstFeature[at];
  const features = (name) => pack.slice(name, firstFeature, nFeatures);
  const metrics = {};
  for (const name of pack.file.names) {
    if (name.startsWith("neuron_")) metrics[name.slice("neuron_".length)] = pack.file.array(name)[at];
  }
  return {
    run,
    row,
    site,
    neuron,
    metrics,
    n,
    nFeatures,
    damage: pack.damage,
    labels: pack.labels.slice(firstFeature, firstFeature + nFeatures),
    medoids: features("feature_medoid"),
    examples: {
      input: examples("input"),
      inputNumber: examples("input_number"),
      position: examples("position"),
      activation: examples("activation"),
      feature: examples("feature"),
      meaning: examples("meaning"),
      thumb: examples("thumb"),
      class: examples("class"),
    },
    tree: {
      nodes: pack.slice("tree_nodes", pack.firstMerge[at], pack.merges[at]),
      heights: pack.slice("tree_heights", pack.firstMerge[at], pack.merges[at]),
    },
    meaningTree: pack.file.has("meaning_nodes")
      ? { nodes: pack.slice("meaning_nodes", pack.firstMerge[at], pack.merges[at]), overlaps: pack.slice("meaning_overlap", pack.firstMerge[at], pack.merges[at]) }
      : null,
    layout: examples("layout"),
    layoutInput: examples("layout_input"),
    histogram: pack.file.has("histogram")
      ? { counts: pack.slice("histogram", at, 1), upper: pack.slice("histogram_upper", at, 1)?.[0] ?? NaN }
      : null,
    tokens: tokensOf(run, pack, examples),
    random: randomOf(pack, at),
    promoted: logitTokens(pack, "promoted", at),
    suppressed: logitTokens(pack, "suppressed", at),
    similar: similarOf(pack, firstFeature, nFeatures),
    image: run.image ? imageOf(pack, at, first, n) : null,
    thumbs: pack.file.has("thumbs") ? thumbsOf(pack) : null,
  };
}

/** Fetches what the neuron's page needs, so that it opens at once. Never fails. */
export function prefetch(run, row) {
  if (row < 0 || row >= run.n_neurons) return;
  const { site, neuron } = neuronOf(run, row);
  packOf(run, site, neuron).catch(() => {});
}

const opened = new WeakMap();
/** The file that holds a neuron (no file holds two sites), with the offsets of its neurons. */
async function packOf(run, site, neuron) {
  const file = await tensors(`${run.index}/packs/${site.first_pack + Math.floor(neuron / run.pack)}.safetensors`);
  let pack = opened.get(file);
  if (!pack) {
    const counts = file.array("counts");
    const featureCounts = file.array("feature_counts");
    // A tree of n examples has n - 1 merges; a dead neuron has none.
    const merges = Array.from(counts, (c) => Math.max(0, c - 1));
    pack = {
      file,
      counts,
      featureCounts,
      merges,
      firstExample: starts(counts),
      firstFeature: starts(featureCounts),
      firstMerge: starts(merges),
      vocabulary: JSON.parse(file.metadata.vocabulary ?? "[]"),
      labels: JSON.parse(file.metadata.labels ?? "[]"),
      damage: JSON.parse(file.metadata.damage ?? "[]"),
      /** Rows first ... first + n of an array, flat; null if the file lacks it. */
      slice(name, first, n) {
        if (!file.has(name)) return null;
        const each = file.shape(name).slice(1).reduce((a, b) => a * b, 1);
        return file.array(name).subarray(first * each, (first + n) * each);
      },
    };
    opened.set(file, pack);
  }
  return pack;
}

function starts(counts) {
  let sum = 0;
  return Array.from(counts, (c) => (sum += c) - c);
}

function tokensOf(run, pack, examples) {
  // In a damaged run, only the tokens of the random examples may be left.
  const any = ["window_tokens", "random_tokens"].find((name) => pack.file.has(name));
  if (!any) return null;
  return {
    width: pack.file.shape(any)[1],
    before: run.window[0],
    vocabulary: pack.vocabulary,
    window: examples("window_tokens"),
    shares: examples("window_shares"),
    importances: examples("importances"),
  };
}

function randomOf(pack, at) {
  if (!pack.file.has("random_counts")) return null;
  const counts = pack.file.array("random_counts");
  const first = starts(counts)[at];
  const part = (name) => pack.slice(name, first, counts[at]);
  return {
    n: counts[at],
    input: part("random_input"),
    position: part("random_position"),
    activation: part("random_activation"),
    tokens: part("random_tokens"),
    thumb: part("random_thumb"),
  };
}

function logitTokens(pack, which, at) {
  const tokens = pack.slice(`${which}_tokens`, at, 1);
  const logits = pack.slice(`${which}_logits`, at, 1);
  if (!tokens || !logits) return null;
  const rows = Array.from(tokens, (t, i) => ({ token: pack.vocabulary[t], logit: logits[i] }));
  return rows.filter(({ token, logit }) => token !== undefined && !Number.isNaN(logit));
}

function similarOf(pack, firstFeature, nFeatures) {
  if (!pack.file.has("similar_counts")) return null;
  const counts = pack.file.array("similar_counts");
  const from = starts(counts);
  const lists = [];
  for (let f = firstFeature; f < firstFeature + nFeatures; f++) {
    const part = (name) => pack.slice(name, from[f], counts[f]);
    const width = pack.file.has("similar_tokens") ? pack.file.shape("similar_tokens")[1] : 0;
    const [site, neuron, feature, similarity, tokens] = [
      "similar_site",
      "similar_neuron",
      "similar_feature",
      "similar_similarity",
      "similar_tokens",
    ].map(part);
    lists.push(
      Array.from(site, (_, i) => ({
        site: site[i],
        neuron: neuron[i],
        feature: feature[i],
        similarity: similarity[i],
        tokens: tokens && words(pack.vocabulary, tokens.subarray(i * width, (i + 1) * width)),
        thumb: part("similar_thumb")?.[i],
      })),
    );
  }
  return lists;
}

/** The strings of a row of tokens; null where the window extends beyond the context. */
function words(vocabulary, row) {
  return Array.from(row, (t) => (t < 0 ? null : vocabulary[t]));
}

function imageOf(pack, at, first, n) {
  const one = (name) => pack.slice(name, at, 1);
  return {
    weights: one("weights"),
    activationMap: one("activation_map"),
    average: one("average"),
    kernel: one("kernel"),
    logitGradient: one("logit_gradient"),
    logitAblation: one("logit_ablation"),
    embedding: pack.slice("embedding", first, n),
    shapeOf: (name) => (pack.file.has(name) ? pack.file.shape(name).slice(1) : null),
  };
}

function thumbsOf(pack) {
  const shape = pack.file.shape("thumbs").slice(1);
  const size = shape.reduce((a, b) => a * b, 1);
  const pixels = pack.file.array("thumbs");
  return { shape, of: (i) => pixels.subarray(i * size, (i + 1) * size) };
}

/** Strings of the window of example `i` of a neuron's `tokens` (or `random`); null beyond the context. */
export function windowOf(tokens, i, rows = tokens.window) {
  return words(tokens.vocabulary, rows.subarray(i * tokens.width, (i + 1) * tokens.width));
}

/**
 * A whole context by its row in the run's inputs.
 * @returns {Promise<{tokens: string[], number: number}>} `number` is its index in the user's data.
 */
export async function context(run, input) {
  const each = run.contexts_per_file;
  const file = await tensors(`${run.index}/contexts/${Math.floor(input / each)}.safetensors`);
  const vocabulary = JSON.parse(file.metadata.vocabulary);
  const [, width] = file.shape("tokens");
  const i = input % each;
  const row = file.array("tokens").subarray(i * width, i * width + file.array("lengths")[i]);
  return { tokens: words(vocabulary, row), number: file.array("number")[i] };
}

// ------------------------------------------------------------------------------------ search

/**
 * All words with meanings or features, sorted by code point, and the number of each one's file.
 * @returns {Promise<{words: string[], shards: number[]}>}
 */
export async function vocabulary(run) {
  return json(`${run.index}/search/words.json`);
}

/**
 * Meanings or features for one word (as spelled in the list of words), best matches first.
 * @param {"meanings" | "features"} kind
 * @returns {Promise<{site: number, neuron: number, number: number, examples: number, label: string}[]>}
 */
export async function wordHits(run, shard, word, kind) {
  const found = (await json(`${run.index}/search/${shard}.json`))[word]?.[kind] ?? [];
  return found.map(([site, neuron, number, examples, label]) => ({ site, neuron, number, examples, label }));
}

// ----------------------------------------------------------------------------------- two runs

/** The comparison of all runs, or null if there is only one. */
export async function comparison() {
  return (await runs()).length < 2 ? null : json("compare.json");
}

/** For each neuron of the first run its best match in the second (row -1: none), or a `reason` why there are no matches. */
export async function pairs() {
  const file = await tensors("pairs.safetensors");
  return { row: file.array("row"), similarity: file.array("similarity"), by: file.metadata.by ?? "direction", reason: file.metadata.reason };
}

// ------------------------------------------------------------------------------ live functions

/** Calls a function of the live server. @throws {DataError} with the server's message. */
export async function live(name, body, signal) {
  let response;
  try {
    response = await fetch(`api/${name}`, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Polyseme": "1" },
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new DataError(UNREACHABLE);
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new DataError(answer.error ?? `The server answered ${response.status}.`);
  return answer;
}
