// What was analysed and how, in words; from run.json.

import { h } from "./dom.js";
import { whole, number, count } from "./format.js";

/** The run in a few lines: {Model, Data, Examples, Clusters, Created} -> words. */
export function facts(run) {
  const { model, data, settings } = run;
  return [
    ["Model", modelWords(model)],
    ["Data", dataWords(run)],
    ["Examples", selectWords(settings?.select)],
    ["Clusters", clusterWords(run, settings)],
    ["Created", createdWords(run)],
  ].filter(([, words]) => words);
}

function modelWords(model) {
  if (!model) return "";
  const parameters = model.n_parameters ? `, ${count(model.n_parameters, "parameter")}` : "";
  return `${model.name ?? model.class ?? "not recorded"}${parameters}`;
}

function dataWords({ kind, data, n_missing: missing }) {
  if (!data) return "";
  const unit = kind === "text" ? "context" : "image";
  const size = data.n_inputs ? count(data.n_inputs, unit) : "";
  const shape = kind === "image" && data.image_shape ? ` of ${data.image_shape.join(" × ")}` : "";
  const length = kind === "text" && data.length ? ` of up to ${whole(data.length)} tokens` : "";
  const lacking = missing ? `without ${count(missing, unit)} of missing shards` : "";
  return [data.name, `${size}${shape}${length}`, lacking].filter(Boolean).join(", ");
}

function selectWords(select) {
  if (!select) return "";
  const { name, ...options } = select;
  switch (name) {
    case "TopK":
      return `the ${whole(options.k)} strongest`;
    case "FirstActive":
      return `the first ${whole(options.n)} above ${number(options.minimum)}`;
    case "AboveFraction":
      return `those above ${number(options.fraction)} of the maximum, at most ${whole(options.max_examples)}`;
    case "Stratified":
      return `${whole(options.k)}, spread over ${whole(options.bins)} activation bins`;
    default:
      return [name, ...Object.entries(options).map(([key, value]) => `${key} ${value}`)].join(", ");
  }
}

function clusterWords(run, settings) {
  const thresholds = [...new Set(run.sites.map((s) => s.threshold))].sort((a, b) => a - b);
  const linkage = settings?.linkage ? `${settings.linkage} linkage, ` : "";
  return `${linkage}cut at a distance of ${thresholds.map(String).join(" or ")}`;
}

function createdWords(run) {
  const day = new Date(run.created);
  const date = Number.isNaN(day.getTime())
    ? run.created
    : day.toLocaleDateString("en-GB", { day: "numeric", month: "long", year: "numeric", timeZone: "UTC" });
  return `${date ?? ""} by polyseme ${run.polyseme_version}`.trim();
}

/** The facts as a list. */
export function factList(run) {
  return h("dl", { class: "facts" }, facts(run).map(([name, words]) => h("div", {}, h("dt", {}, name), h("dd", {}, words))));
}

/** A list of the run's damage, or null. */
export function damageNotice(run) {
  if (!run.damage?.length) return null;
  return h(
    "section",
    { class: "notice bad", "aria-label": "Damage" },
    h("p", {}, h("strong", {}, "Part of this run is damaged."), " The rest is shown."),
    h("ul", {}, run.damage.map((sentence) => h("li", {}, sentence))),
  );
}
