// What the pages of neurons share: the head, the choice of features, the metrics, and the side
// column with the tree and the maps.

import * as data from "./data.js";
import { h, replace, uniqueId } from "./dom.js";
import { count, number, percent, whole } from "./format.js";
import { siteName } from "./lookup.js";
import { metric, metricNames } from "./metrics.js";
import { activations } from "./activations.js";
import { hasFeatures, hasTree, namesOf } from "./cut.js";
import { dendrogram, featurePlan, meaningPlan } from "./dendrogram.js";
import { downloadButton } from "./download.js";
import { exampleMap } from "./feature-map.js";
import { hasDetails, LEVELS } from "./meanings.js";
import { COLOURS, neighbourKeys, ORDERS } from "./neuron-view.js";
import { badge, paletteOf } from "./palette.js";
import { distances } from "./recut.js";

/** The head of a page: the neuron's name, its neighbours, and what can't be shown. */
function head(view) {
  const { neuron } = view;
  const { run, site } = neuron;
  const links = [["Previous", -1], ["Next", 1]].map(([name, step]) => {
    const next = view.neighbour(step);
    const arrow = h("span", { "aria-hidden": "true" }, step < 0 ? "←" : "→");
    if (next === null) return h("span", { class: "button disabled", "aria-hidden": "true" }, arrow);
    data.prefetch(run, site.first + next);
    return { step, element: h("a", { class: "button", rel: step < 0 ? "prev" : "next", "aria-label": `${name} neuron`, title: `${name} neuron (arrow key)` }, arrow) };
  });
  const follow = () => {
    for (const link of links) if (link.step) link.element.href = view.addressOf(view.neighbour(link.step));
  };
  view.onQuery.push(follow);
  // The address also changes when only the view of the page changes.
  for (const { step, element } of links) if (step) element.addEventListener("pointerdown", follow);
  neighbourKeys(view);
  const wrong = h("div", { role: "status" });
  view.add({ element: wrong, show: () => replace(wrong, view.wrong.map((sentence) => h("p", { class: "notice" }, sentence))) });
  return h("header", { class: "neuron-head" },
    h("div", { class: "neuron-title" },
      h("h1", {}, h("bdi", { class: "neuron-site" }, siteName(run, site)), h("span", { class: "slash" }, " / "), String(neuron.neuron)),
      downloadButton(view),
      h("nav", { class: "neighbours", "aria-label": "Neighbouring neurons" }, links.map((link) => link.element ?? link))),
    neuron.damage.map((sentence) => h("p", { class: "notice bad" }, sentence)),
    wrong);
}

/**
 * Fills a page: the head, the features next to the tree and the maps, and the rest. What can't be
 * read from a damaged run is left out, and the head says so.
 *
 * @param {HTMLElement} main
 * @param {import("./neuron-view.js").NeuronView} view
 * @param {object} parts
 * @param {() => Node[]} parts.features
 * @param {(example: number) => Node[]} parts.tell what a tooltip shows of an example
 * @param {Node} parts.rest
 */
export function fillNeuron(main, view, { features, tell, rest }) {
  const { neuron } = view;
  main.append(head(view));
  if (!neuron.n) main.append(deadNotice(neuron));
  else if (!hasFeatures(neuron)) main.append(h("div", { class: "neuron-features" }, features()));
  else main.append(view.add(figures(view)), h("div", { class: "neuron-layout" }, side(view, { tell }), h("div", { class: "neuron-features" }, features())));
  main.append(rest);
}

/** A notice in place of what is damaged. */
export function lost(sentence) {
  return h("p", { class: "notice bad" }, sentence);
}

/** The controls for which features are shown, and how. */
export function featuresBar(view, ...more) {
  const heading = h("h2", {}, "Features");
  const features = [featureChoice(view), orderChoice(view)];
  const bar = h("div", { class: "features-bar" }, heading, view.groups && view.add(levelChoice(view)), features.map((part) => view.add(part)), more);
  return view.add({
    element: bar,
    show() {
      heading.textContent = view.byMeaning ? "Meanings" : "Features";
      for (const { element } of features) element.hidden = view.byMeaning;
      bar.classList.toggle("by-meaning", view.byMeaning);
    },
  });
}

/** The examples, meaning by meaning or feature by feature. */
export function cardsOf(view, features, meanings) {
  if (!meanings) return view.add(features);
  const element = h("div", { class: "levels" });
  let opened = null; // so that a meaning that the reader has closed stays closed
  return view.add({
    element,
    show(cut, chosen) {
      const [shown, other] = view.byMeaning ? [meanings, features] : [features, meanings];
      if (shown.element.parentNode !== element) {
        other.hide(); // an example can be in only one place
        replace(element, shown.element);
      }
      shown.show(cut, chosen);
      if (view.byMeaning && view.meaning !== opened && view.meaning !== null) meanings.open(Number(view.meaning));
      opened = view.meaning;
    },
  });
}

/** Radio buttons that look like one control. `choose` is called with the chosen value. */
function radios(legend, options, choose) {
  const name = uniqueId("choice");
  const labels = options.map(([value, text]) => h("label", {}, h("input", { type: "radio", name, value, onchange: () => choose(value) }), text));
  return {
    element: h("fieldset", { class: "choice" }, h("legend", { class: "visually-hidden" }, legend), labels),
    check(chosen) {
      for (const label of labels) label.firstChild.checked = label.firstChild.value === chosen;
    },
  };
}

/** The choice between cards for meanings and for features. */
function levelChoice(view) {
  const { element, check } = radios("Show examples by", LEVELS.map((level) => [level, level.replace(/^./, (c) => c.toUpperCase())]),
    (level) => view.go(level, { feature: null, meaning: null }));
  return { element, show: () => check(view.level) };
}

/** The choice of colours in the maps. */
function colourChoice(view) {
  const { element, check } = radios("Colour examples by", COLOURS.map((colour) => [colour, `By ${colour}`]), (colour) => view.ctx.navigate({ colour }));
  return { element, show: () => check(view.colour) };
}

/** The notice for a neuron without examples. */
function deadNotice(neuron) {
  return h("p", { class: "notice" },
    neuron.metrics.density > 0
      ? "No input that activates this neuron meets the run's selection, so it has no examples or features."
      : "This neuron is dead: no input activates it, so it has no examples or features.");
}

/** Metrics that follow the cut. @returns {import("./neuron-view.js").Part & {element: HTMLElement}} */
function figures(view) {
  const { neuron } = view;
  const element = h("dl", { class: `stats neuron-figures${view.groups ? " with-meanings" : ""}` });
  const averages = (neuron.run.settings?.linkage ?? "average") === "average" && hasTree(neuron);
  const m = neuron.metrics;
  const active = activeInputs(neuron);
  return {
    element,
    show(cut) {
      const at = averages
        ? distances(neuron.tree, neuron.n, cut.threshold)
        : { within: cut.own ? m.intra_cluster_distance : NaN, between: cut.own ? m.inter_cluster_distance : NaN };
      replace(element, [
        ["n_examples", whole(neuron.n), active > 0 && `of ${whole(active)}`],
        view.groups && ["n_meanings", whole(view.groups.n)],
        ["n_clusters", whole(cut.n)],
        ["largest_share", percent(cut.features[0].length / neuron.n)],
        ["mean_distance", number(m.mean_distance)],
        ["intra_cluster_distance", number(at.within)],
        ["inter_cluster_distance", number(at.between)],
        ["calibrated_distance", number(m.calibrated_distance)],
        [m.token_density === undefined ? "density" : "token_density", percent(m.token_density ?? m.density)],
        ["max_activation", number(m.max_activation)],
      ].filter(Boolean).map(([name, value, more]) => {
        const { label, reading } = metric(name);
        return h("div", { title: reading }, h("dt", {}, label), h("dd", {}, value, more && h("small", {}, ` ${more}`)));
      }));
    },
  };
}

/** Number of inputs that activate a neuron, from which its examples were selected. */
export function activeInputs(neuron) {
  return neuron.histogram ? neuron.histogram.counts.reduce((a, b) => a + b, 0) : NaN;
}

/** All metrics of the neuron, each with an explanation. */
export function metricsTable(neuron) {
  const rows = metricNames(Object.keys(neuron.metrics)).map((name) => {
    const { label, reading, kind } = metric(name);
    const value = neuron.metrics[name];
    const text = kind === "integer" ? whole(value) : kind === "share" ? percent(value) : number(value, 4);
    return h("tr", {}, h("th", { scope: "row" }, label), h("td", { class: "num" }, text), h("td", { class: "reading" }, reading));
  });
  return h("div", { class: "scroll-x", tabindex: 0, role: "region", "aria-label": "Table of metrics" },
    h("table", { class: "plain metrics" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Metric"), h("th", { scope: "col", class: "num" }, "Value"), h("th", { scope: "col" }, "How to read it"))),
      h("tbody", {}, rows)));
}

/** A framed part of the page, with a heading. */
export function card(title, ...children) {
  const id = uniqueId("part");
  return h("section", { class: "card", "aria-labelledby": id }, h("header", {}, h("h2", { id }, title)), children);
}

/** The choice of features: all, or one. */
function featureChoice(view) {
  const element = h("nav", { class: "feature-choice", "aria-label": "Features" });
  const go = (feature) => view.go("features", { feature });
  return {
    element,
    show(cut, chosen) {
      const item = (feature, ...content) =>
        h("button", {
          type: "button", class: "feature-tab", "aria-pressed": String(chosen === feature), dataset: { tab: feature ?? "all" },
          onclick: () => {
            go(feature);
            // The buttons are rebuilt; restore the focus for keyboard users.
            element.querySelector(`[data-tab="${feature ?? "all"}"]`)?.focus();
          },
        }, content);
      const tab = (name) => {
        if (name === "singles") return item(name, count(cut.n - cut.shared, "single"));
        const size = cut.features[name].length;
        return item(name, badge(name, paletteOf(Number(name), size)), h("small", {}, ` ${size}`));
      };
      replace(element, item(null, "All"), namesOf(view.neuron, cut, view.order).map(tab));
    },
  };
}

const ORDER_NAMES = { size: "Largest feature first", maximum: "Feature with the strongest example first", strongest: "Strongest example first, across features" };

/** The choice of order: of features, or of examples across features. */
function orderChoice(view) {
  const select = h("select", { onchange: () => view.go("features", { order: select.value === ORDERS[0] ? null : select.value }) },
    ORDERS.map((order) => h("option", { value: order }, ORDER_NAMES[order])));
  return {
    element: h("label", { class: "field" }, "Order", select),
    show: () => (select.value = view.order),
  };
}

/** The tree, the maps and the activations, in a column that stays visible. */
function side(view, { tell }) {
  const { neuron, link, signal } = view;
  const parts = neuron.n > 1 ? [h("div", { class: "side-tree" }, trees(view))] : [];
  const pictures = [
    ["layout", "Weighted by the neuron", "Neuron embeddings: nearby examples activate the neuron through the same weights."],
    ["layoutInput", "Raw input", "The layer's inputs: nearby examples are similar, whatever the neuron reads."],
  ].filter(([name]) => neuron[name]?.length && neuron.n > 1);
  const rest = [];
  if (pictures.length) {
    const maps = pictures.map(([name, title, says]) =>
      view.add(grouped(view, exampleMap(neuron, { layout: neuron[name], title, says, link, signal, tell }))));
    const kind = h("span", {}, "feature");
    rest.push(card("Examples in two dimensions",
      view.groups && h("div", { class: "map-colour" }, view.add(colourChoice(view))),
      h("div", { class: "maps" }, maps),
      h("p", { class: "quiet-text small" }, "The two leading directions of the cosine geometry, with the neuron's weights (left) and without them. Each point is an example; its shape and colour show its ",
        view.add({ element: kind, show: () => (kind.textContent = view.colour) }), ".")));
  }
  if (neuron.histogram) {
    rest.push(card("Activations", view.add(grouped(view, activations(neuron, { link, signal })))));
  }
  parts.push(h("div", { class: "side-pictures" }, rest));
  const element = h("div", { class: "neuron-side" }, parts);
  const observer = new ResizeObserver(() => element.style.setProperty("--height", `${element.offsetHeight}px`));
  observer.observe(element);
  signal.addEventListener("abort", () => observer.disconnect());
  return element;
}

/** The threshold, on the tree of meanings or of features. */
function trees(view) {
  const { neuron, signal, link } = view;
  const features = hasTree(neuron) && dendrogram(featurePlan(neuron), { signal, link, onThreshold: (value, settled) => view.setThreshold(value, settled) });
  const meanings = view.groups && neuron.meaningTree && dendrogram(meaningPlan(neuron), { signal, link, onThreshold: (value, settled) => view.setOverlap(value, settled) });
  const ofFeatures = h("div", {}, features ? features.element : h("p", { class: "notice" }, "The trees of this run can't be read, so the features are shown at the run's own threshold."));
  const why = h("p", { class: "quiet-text small" });
  const ofMeanings = h("div", { hidden: true }, meanings && meanings.element, why,
    h("p", { class: "quiet-text small" }, "Overlap says how much the two sides of a branch have in common: about 1 for two halves of one meaning, about 0 for unrelated meanings. Sides that overlap less than the threshold are different meanings."));
  return card("Clustering threshold", view.add({
    element: h("div", {}, ofFeatures, ofMeanings),
    show(cut, chosen) {
      const byMeaning = Boolean(view.byMeaning && meanings);
      ofFeatures.hidden = byMeaning;
      ofMeanings.hidden = !byMeaning;
      if (features) features.show(cut, chosen);
      if (!byMeaning) return;
      meanings.show(view.groups, null, !view.canRegroup);
      why.hidden = view.canRegroup;
      why.textContent = hasDetails(neuron.run) ? "" : "Meanings at other thresholds aren’t in this export.";
    },
  }));
}

/** A map of all examples, coloured as the reader chose. */
function grouped(view, { element, show }) {
  return {
    element,
    show(cut, chosen) {
      const { grouping } = view;
      show(grouping, grouping === cut ? chosen : null);
    },
  };
}
