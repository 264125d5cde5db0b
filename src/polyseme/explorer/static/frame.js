// The header and footer that surround every page.

import * as data from "./data.js";
import { h, replace, uniqueId } from "./dom.js";
import { address, neuronAddress } from "./route.js";
import { example, findNeuron } from "./lookup.js";
import { completions } from "./words.js";

let shown = null; // the run that the header was built for

/** Builds the header; if only the page changed, marks the new page. */
export function header(element, state) {
  const key = `${state.run?.index}`;
  if (shown !== key) {
    shown = key;
    replace(element, h("div", { class: "top-in" }, brand(state), navigation(state), search(state), tools(state)));
  }
  for (const link of element.querySelectorAll("nav a")) {
    if (link.dataset.page === state.route.page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const field = element.querySelector("input[type=search]");
  if (field && state.route.page === "search") field.value = state.route.query.get("q") ?? "";
}

function brand(state) {
  return h(
    "a",
    { class: "brand", href: address("overview", [], { run: state.run?.index }), "aria-label": "polyseme: overview" },
    h("img", { src: "static/logo.svg", alt: "", width: 28, height: 28 }),
    h("span", { class: "wordmark" }, "polyseme"),
  );
}

function navigation(state) {
  const { run, runs, live } = state;
  const pages = [["overview", "Overview"]];
  if (run?.kind === "text" && live.has("probe")) pages.push(["probe", "Probe"]);
  if (run?.kind === "image" && live.has("classify")) pages.push(["classify", "Classify"]);
  if (runs.length > 1) pages.push(["compare", "Compare"]);
  pages.push(["about", "About"]);
  return h(
    "nav",
    { "aria-label": "Pages" },
    runs.length > 1 && run && runSwitch(state),
    pages.map(([page, name]) =>
      h("a", { href: address(page, [], { run: run?.index }), dataset: { page } }, name),
    ),
  );
}

function runSwitch({ runs, run }) {
  const select = h(
    "select",
    { "aria-label": "Run", class: "run-switch", onchange: () => (location.hash = address("overview", [], { run: select.value })) },
    runs.map((other, i) => h("option", { value: i, selected: i === run.index, dir: "auto" }, other.title)),
  );
  return select;
}

function search({ run }) {
  const list = h("datalist", { id: uniqueId("words") });
  const field = h("input", {
    type: "search",
    name: "q",
    placeholder: run ? `${example(run)}${run.has.search ? ", a word, a label" : " (a neuron)"}` : "",
    "aria-label": run?.has?.search ? "Search for a neuron, a word or a label" : "Search for a neuron",
    list: list.id,
    autocomplete: "off",
    spellcheck: "false",
    enterkeyhint: "search",
  });
  field.addEventListener("input", async () => {
    const { words } = run?.has?.search ? await data.vocabulary(run).catch(() => ({ words: [] })) : { words: [] };
    replace(list, completions(words, field.value, 10).map((value) => h("option", { value })));
  });
  const submit = (event) => {
    event.preventDefault();
    const q = field.value.trim();
    if (!q || !run) return;
    const neuron = findNeuron(run, q);
    location.hash = neuron && !neuron.problem
      ? neuronAddress(run, neuron.site, neuron.neuron)
      : address("search", [], { run: run.index, q });
    field.blur();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || !field.isConnected) return;
    if (event.target instanceof Element && event.target.closest("input, textarea, select")) return;
    event.preventDefault();
    field.focus();
    field.select();
  });
  return h(
    "form",
    { role: "search", class: "search", onsubmit: submit },
    field,
    h("kbd", { "aria-hidden": "true" }, "/"),
    list,
  );
}

function tools({ run }) {
  return h(
    "div",
    { class: "tools" },
    run &&
      h(
        "button",
        { type: "button", class: "quiet", "aria-label": "I’m feeling lucky", title: "A random neuron with more than one feature", onclick: () => lucky(run) },
        h("span", { class: "lucky-long" }, "I’m feeling lucky"),
        h("span", { class: "lucky-short" }, "Lucky"),
      ),
    themeButton(),
  );
}

/** Goes to a random neuron with more than one feature, if there is one. */
async function lucky(run) {
  const table = await data.neurons(run);
  const [clusters, examples] = [table.column("n_clusters"), table.column("n_examples")];
  const several = [];
  const alive = [];
  for (let row = 0; row < table.n; row++) {
    if (examples[row] > 0) alive.push(row);
    if (clusters[row] > 1) several.push(row);
  }
  const among = several.length ? several : alive;
  if (!among.length) return;
  const { site, neuron } = data.neuronOf(run, among[Math.floor(Math.random() * among.length)]);
  location.hash = neuronAddress(run, site.number, neuron);
}

function themeButton() {
  const dark = () =>
    (document.documentElement.dataset.theme ??
      (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const button = h("button", { type: "button", class: "quiet theme" });
  const name = () => {
    replace(button, h("span", { class: "theme-icon", "aria-hidden": "true" }));
    button.setAttribute("aria-label", dark() ? "Light theme" : "Dark theme");
    button.title = button.getAttribute("aria-label");
  };
  const changed = () => {
    name();
    window.dispatchEvent(new Event("themechange"));
  };
  button.addEventListener("click", () => {
    const theme = dark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem("polyseme-theme", theme);
    } catch {
      // Storage may be blocked; then the choice lasts until the page is closed.
    }
    changed();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  name();
  return button;
}

/** Results of the file check by run, each requested once. */
const checks = new Map();

/** Builds the footer, unless it already shows this run. */
export function footer(element, { run }) {
  const key = `${run?.index}`;
  if (element.dataset.run === key) return;
  element.dataset.run = key;
  const state = h("span", { role: "status" });
  replace(
    element,
    h("p", {}, h("span", { class: "wordmark" }, "polyseme"), run ? ` ${run.polyseme_version} ` : "", state),
    h("p", {}, h("a", { href: address("about", [], { run: run?.index }) }, "What the metrics mean, and what they do not")),
  );
  replace(document.getElementById("altered"));
  if (run) showCheck(run, state);
}

/** Shows the result of the file check in the footer, and altered files above the page. */
async function showCheck(run, state) {
  if (!checks.has(run.index)) checks.set(run.index, data.verified(run));
  state.textContent = "· checking the run’s files…";
  try {
    const { files } = await checks.get(run.index);
    if (!state.isConnected) return; // another run is shown now
    state.textContent = files.length ? "· altered files" : "· verified: the run’s files are unchanged";
    if (files.length) {
      replace(document.getElementById("altered"), h("div", { class: "notice bad" },
        h("strong", {}, files.length === 1 ? "A file of this run was altered: " : "Files of this run were altered: "),
        files.map((file, i) => [i > 0 && ", ", h("bdi", {}, file)]),
        ". The pages may be wrong. Copy the run again from its source, or repeat the analysis."));
    }
  } catch (error) {
    checks.delete(run.index);
    state.textContent = `· not verified: ${error.message}`;
  }
}
