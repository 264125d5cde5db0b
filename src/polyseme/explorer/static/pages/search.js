// Finds neurons, meanings and features by what the reader types: a neuron's address, a layer, words, part of a label.

import * as data from "../data.js";
import { h } from "../dom.js";
import { count, isolated, whole } from "../format.js";
import { example, findNeuron, neuronName, siteName, siteOf } from "../lookup.js";
import { address, neuronAddress } from "../route.js";
import { beginning, find, spelling } from "../words.js";

const SUGGESTED = 24;

export async function render(main, ctx) {
  const { run, query } = ctx;
  const q = (query.get("q") ?? "").trim();
  main.append(
    h("h1", {}, q ? ["Search: ", h("bdi", {}, q)] : "Search"),
    h(
      "p",
      { class: "lead" },
      `Enter a neuron by ${run.sites.length > 1 ? "its layer and number (" : "its number ("}`,
      h("code", {}, example(run)),
      ")",
      run.sites.length > 1 && ", part of a layer’s name",
      run.has.search ? ", or words that meanings and features are about; the beginning of a word is enough." : ". This run has no texts, so there are no words to search for.",
    ),
  );
  if (!q) return;
  const neuron = findNeuron(run, q);
  const layers = neuron ? [] : findSites(run, q);
  if (neuron) main.append(neuron.problem ? notice(neuron.problem) : neuronHit(run, neuron));
  if (layers.length) main.append(layerHits(run, layers));
  const found = Boolean(neuron || layers.length);
  if (!run.has.search || (found && /^layer\s+\d+$/i.test(q))) {
    if (!found) main.append(notice(`“${isolated(q)}” is not a neuron or layer of this run.`));
    return;
  }
  const vocabulary = await data.vocabulary(run);
  const [meanings, features] = await Promise.all(["meanings", "features"].map((kind) => find(run, vocabulary, q, kind)));
  const { parts, unknown } = features;
  const hits = [...meanings.hits, ...features.hits];
  const quoted = (words) => words.map((word) => `“${isolated(word)}”`).join(" and ");
  if (hits.length) {
    if (unknown.length) main.append(notice(`No word with meanings or features begins with ${quoted(unknown)}, so it is ignored.`));
    if (meanings.hits.length) main.append(results(ctx, parts, meanings.hits, "meaning"));
    if (features.hits.length) main.append(results(ctx, parts, features.hits, "feature"));
  } else if (parts.length > 1) {
    main.append(
      notice("No meaning or feature is listed for all of these words; at most 100 are listed per word. Search for a single word: ",
        parts.map(({ typed }, i) => [i ? ", " : "", h("a", { href: address("search", [], { run: run.index, q: typed }) }, h("bdi", {}, typed))]), "."),
    );
  } else if (!found) {
    main.append(notice(`No meaning or feature has ${quoted(unknown)} in its label or among its tokens.`));
  }
  const like = beginning(vocabulary.words, spelling(q)).filter((word) => word !== spelling(q)).slice(0, SUGGESTED);
  if (like.length) main.append(suggestions(run, like));
  if (hits.length || !found) ctx.announce(hits.length ? `${count(meanings.hits.length, "meaning")} and ${count(features.hits.length, "feature")}` : "Nothing found");
}

function notice(...words) {
  return h("p", { class: "notice", role: "status" }, words);
}

function neuronHit(run, { site, neuron }) {
  return h("p", {}, "Neuron ", h("a", { href: neuronAddress(run, site, neuron) }, `${siteName(run, run.sites[site])} / ${neuron}`));
}

/** Finds sites by layer or by part of their name. */
function findSites(run, q) {
  const text = q.toLowerCase().replace(/^layer\s+(?=\d+$)/, "").replace(/\/$/, "");
  const exact = siteOf(run, text);
  if (exact || /^\d*$/.test(text)) return exact ? [exact] : [];
  return run.sites.filter(({ name }) => name.toLowerCase().includes(text));
}

function layerHits(run, sites) {
  return h(
    "section",
    { "aria-label": "Layers" },
    h("h2", {}, "Layers"),
    h("ul", { class: "words" }, sites.map((site) => h("li", {}, h("a", { class: "chip", href: address("overview", [], { run: run.index, layer: run.sites.length > 1 ? site.address : null }) }, siteName(run, site))))),
  );
}

const SAYS = {
  meaning: [
    "Meanings with the word in their label, that is, at the maxima of their examples; most frequent first. At most 100 are listed.",
    "Meanings whose label matches every word, largest first. At most 100 are searched per word.",
  ],
  feature: [
    "Features with the word among their activating tokens or in their label. Labels that begin with the word come first, then larger features. At most 100 are listed.",
    "Features whose activating tokens or label match every word, largest first. At most 100 are searched per word.",
  ],
};

/** @param {"meaning" | "feature"} noun */
function results(ctx, parts, hits, noun) {
  const { run, query, navigate } = ctx;
  const layers = [...new Set(hits.map(({ site }) => site))].sort((a, b) => a - b);
  const layer = query.has("layer") ? siteOf(run, query.get("layer")) : null;
  const shown = layer ? hits.filter(({ site }) => site === layer.number) : hits;
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
          h("option", { value: run.sites[number].address, selected: number === layer?.number }, siteName(run, run.sites[number])),
        ),
      ),
    );
  return h(
    "section",
    { class: "card" },
    h(
      "header",
      {},
      h("h2", {}, `${count(shown.length, noun)} for ${parts.map(({ typed, words }) => `“${isolated(typed)}${words[0] === typed ? "" : "…"}”`).join(" and ")}`),
      choice,
    ),
    h("p", { class: "reading" }, SAYS[noun][parts.length === 1 && parts[0].words.length === 1 ? 0 : 1]),
    h(
      "div",
      { class: "scroll-x" },
      h(
        "table",
        { class: "plain hits" },
        h("thead", {}, h("tr", {}, ["Neuron", noun === "meaning" ? "Meaning" : "Feature", "Label", "Examples"].map((name, i) => h("th", { scope: "col", class: i === 3 || i === 1 ? "num" : null }, name)))),
        h("tbody", {}, shown.map((hit) => line(run, hit, noun))),
      ),
    ),
  );
}

function line(run, { site, neuron, number, examples, label }, noun) {
  const info = run.sites[site];
  return h(
    "tr",
    {},
    h(
      "th",
      { scope: "row" },
      h(
        "a",
        { href: neuronAddress(run, site, neuron, { [noun]: number }), onpointerenter: () => data.prefetch(run, info.first + neuron) },
        neuronName(run, info, neuron),
      ),
      info.address !== info.name && h("span", { class: "layer quiet-text small" }, h("bdi", {}, info.name)),
    ),
    h("td", { class: "num" }, number),
    h("td", {}, h("bdi", { dir: "ltr" }, label)),
    h("td", { class: "num" }, whole(examples)),
  );
}

function suggestions(run, words) {
  return h(
    "section",
    { "aria-label": "Words with this beginning" },
    h("h2", {}, "Words with this beginning"),
    h("ul", { class: "words" }, words.map((word) => h("li", {}, h("a", { class: "chip", href: address("search", [], { run: run.index, q: word }) }, h("bdi", {}, word))))),
  );
}
