// Neurons and features by what the reader types: a neuron's address, words, a part of a label.

import * as data from "../data.js";
import { h } from "../dom.js";
import { count, whole } from "../format.js";
import { directNeuron, siteName } from "../lookup.js";
import { address, neuronAddress } from "../route.js";

const SUGGESTED = 24;

export async function render(main, ctx) {
  const { run, query } = ctx;
  const q = (query.get("q") ?? "").trim();
  main.append(
    h("h1", {}, q ? `Search: ${q}` : "Search"),
    h(
      "p",
      { class: "lead" },
      `Type a neuron by ${run.sites.length > 1 ? "its layer and number (" : "its number ("}`,
      h("code", {}, run.sites.length > 1 ? `${run.sites.at(-1).number}/345` : "345"),
      ")",
      run.has.search ? ", a word that sets features off, or words of a feature’s label." : ". This run has no texts, so there are no words to search for.",
    ),
  );
  if (!q) return;
  const direct = directNeuron(run, q);
  if (direct) main.append(neuronHit(run, direct));
  if (!run.has.search) {
    if (!direct) main.append(h("p", { class: "notice", role: "status" }, `“${q}” is no neuron of this run.`));
    return;
  }
  const vocabulary = await data.vocabulary(run);
  const { words, hits } = await find(run, vocabulary, q);
  const like = similar(vocabulary.words, q, words);
  if (hits.length) main.append(results(ctx, words, hits));
  else if (words.length > 1) {
    main.append(
      h("p", { class: "notice", role: "status" }, "No feature is listed for all of these words, of which at most 100 are for each. One word alone: ",
        words.map((word, i) => [i ? ", " : "", h("a", { href: address("search", [], { run: run.index, q: word }) }, h("bdi", {}, word))]), "."),
    );
  } else if (!direct) {
    main.append(h("p", { class: "notice", role: "status" }, `No feature has “${q}” among its tokens or in its label.`));
  }
  if (like.length) main.append(suggestions(run, like));
  ctx.announce(hits.length ? count(hits.length, "feature") : "Nothing found");
}

function neuronHit(run, { site, neuron }) {
  const info = run.sites.find((s) => s.number === site);
  return h("p", {}, "Neuron ", h("a", { href: neuronAddress(run.index, site, neuron) }, `${siteName(run, info)} / ${neuron}`));
}

/** Features that have every word of the query (as many of them as the run knows), by number of examples. */
async function find(run, vocabulary, q) {
  const whole = spelling(q);
  const known = vocabulary.words.includes(whole)
    ? [whole]
    : [...new Set(whole.split(/\s+/))].filter((word) => vocabulary.words.includes(word));
  const lists = await Promise.all(
    known.map((word) => data.wordFeatures(run, vocabulary.shards[vocabulary.words.indexOf(word)], word)),
  );
  if (!lists.length) return { words: [], hits: [] };
  const key = ({ site, neuron, feature }) => `${site}/${neuron}/${feature}`;
  // A list is cut off at its first hundred, so a feature beyond them counts by its label.
  const sets = lists.map((list) => new Set(list.map(key)));
  const has = (hit, i) => sets[i].has(key(hit)) || spelling(hit.label).split(" ").includes(known[i]);
  const every = new Map(lists.flat().map((hit) => [key(hit), hit]));
  return { words: known, hits: [...every.values()].filter((hit) => known.every((_, i) => has(hit, i))) };
}

/** As the list of words spells it: without the spaces around it, and its case folded. */
function spelling(text) {
  return text.trim().replace(/\s+/g, " ").toLowerCase().replaceAll("ß", "ss");
}

function similar(words, q, used) {
  const start = spelling(q);
  return words.filter((word) => word.startsWith(start) && !used.includes(word)).slice(0, SUGGESTED);
}

function results(ctx, words, hits) {
  const { run, query, navigate } = ctx;
  const layers = [...new Set(hits.map(({ site }) => site))].sort((a, b) => a - b);
  const layer = query.get("layer");
  const shown = layer === null ? hits : hits.filter(({ site }) => String(site) === layer);
  const choice =
    layers.length > 1 &&
    h(
      "label",
      { class: "field" },
      "Layer",
      h(
        "select",
        { onchange: (event) => navigate({ layer: event.target.value }) },
        h("option", { value: "" }, "all"),
        layers.map((number) =>
          h("option", { value: number, selected: String(number) === layer }, siteName(run, run.sites.find((s) => s.number === number))),
        ),
      ),
    );
  return h(
    "section",
    { class: "card" },
    h(
      "header",
      {},
      h("h2", {}, `${count(shown.length, "feature")} for ${words.map((word) => `“${word}”`).join(" and ")}`),
      choice,
    ),
    h("p", { class: "reading" }, "Features with the word among the tokens that set them off or in their label; those whose label begins with it come first, and larger ones before smaller. At most 100 are listed."),
    h(
      "div",
      { class: "scroll-x" },
      h(
        "table",
        { class: "plain hits" },
        h("thead", {}, h("tr", {}, ["Neuron", "Feature", "Label", "Examples"].map((name, i) => h("th", { scope: "col", class: i === 3 || i === 1 ? "num" : null }, name)))),
        h("tbody", {}, shown.map((hit) => line(run, hit))),
      ),
    ),
  );
}

function line(run, { site, neuron, feature, examples, label }) {
  const info = run.sites.find((s) => s.number === site);
  return h(
    "tr",
    {},
    h(
      "th",
      { scope: "row" },
      h(
        "a",
        { href: neuronAddress(run.index, site, neuron, { feature }), onpointerenter: () => data.prefetch(run, info.first + neuron) },
        run.sites.length > 1 ? `${site}/${neuron}` : whole(neuron),
      ),
      h("span", { class: "layer quiet-text small" }, info.name),
    ),
    h("td", { class: "num" }, feature),
    h("td", {}, h("bdi", { dir: "ltr" }, label)),
    h("td", { class: "num" }, whole(examples)),
  );
}

function suggestions(run, words) {
  return h(
    "section",
    { "aria-label": "Words that begin so" },
    h("h2", {}, "Words that begin so"),
    h("ul", { class: "words" }, words.map((word) => h("li", {}, h("a", { class: "chip", href: address("search", [], { run: run.index, q: word }) }, h("bdi", {}, word))))),
  );
}
