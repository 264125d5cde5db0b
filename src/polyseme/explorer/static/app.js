// The explorer's frame: header, routes, theme, keys, focus.
//
// A page is a module pages/NAME.js with
//
//     export async function render(main, ctx)
//
// which fills `main` (its own element, laid out but hidden until the promise resolves,
// so that it can be measured; it should hold one <h1>). ctx:
//
//   runs      what data/runs.json lists: [{title, kind}, ...]
//   run       data/I/run.json of the run in the address, and its `index`
//   params    the parts of the path: #/neuron/3/345 -> ["3", "345"]
//   query     URLSearchParams of the address (of the hash, after its "?")
//   navigate  (changes, {replace}) => void: changes parameters of the query; null removes one.
//             With replace, only the address changes, to match what the page already shows.
//             Without, the change is a new history entry and the page is updated (see below).
//   live      Set of the server's live functions: "probe", "classify", "importances"; empty in an export
//   signal    AbortSignal: aborts when the reader leaves the page
//   announce  (text) => void: announces a text to screen readers
//
// render may return {update(query)}: when only the query changes (back, forward, navigate), the
// app calls update instead of render. update may return false to request a new render.
// A page that handles keys listens on document with ctx.signal and checks `typing(event)` (keys.js) first.

import * as data from "./data.js";
import { h, replace } from "./dom.js";
import { parse, address } from "./route.js";
import { header, footer } from "./frame.js";

const PAGES = {
  overview: () => import("./pages/overview.js"),
  search: () => import("./pages/search.js"),
  compare: () => import("./pages/compare.js"),
  about: () => import("./pages/about.js"),
  neuron: async (run) =>
    (await run).kind === "image" ? import("./pages/neuron-image.js") : import("./pages/neuron-text.js"),
  probe: () => import("./pages/probe.js"),
  classify: () => import("./pages/classify.js"),
};

const live = new Set(
  (document.querySelector('meta[name="polyseme-live"]')?.content ?? "").split(/\s+/).filter(Boolean),
);
const main = document.getElementById("main");
const announcer = document.getElementById("announcer");
const progress = document.getElementById("progress");

/** The page on screen: {route, run, controller, update, element}. */
let current = null;
/** The page that is loading. */
let coming = null;
const left = new Map(); // address -> where the reader was: scroll position of the page and of its table, focused link

let returned = false; // whether the browser's back or forward led to this view, not a link

history.scrollRestoration = "manual";
history.replaceState({ seen: true }, "");
window.addEventListener("hashchange", (event) => {
  left.set(new URL(event.oldURL).hash || "#/", {
    page: window.scrollY,
    rows: main.querySelector(".rows")?.scrollTop ?? 0,
    link: document.activeElement?.closest?.(".rows a")?.getAttribute("href"),
  });
  returned = history.state?.seen === true;
  history.replaceState({ seen: true }, "");
  go();
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the hash is the route
  main.focus();
});
go();

async function go() {
  const route = parse(location.hash);
  const runIndex = Number(route.query.get("run") ?? 0);
  const same =
    current &&
    !coming &&
    current.route.page === route.page &&
    current.route.params.join("/") === route.params.join("/") &&
    current.run?.index === runIndex;
  if (same && current.update) {
    current.route = route;
    if ((await current.update(route.query)) !== false) return drawFrame();
  }
  coming?.controller.abort();
  const page = { route, run: null, controller: new AbortController(), update: null, element: h("div", { class: "page pending" }) };
  coming = page;
  const late = setTimeout(() => (progress.hidden = false), 150);
  try {
    main.append(page.element);
    await fillPage(page, runIndex);
  } catch (error) {
    if (coming === page) showError(page, error);
  } finally {
    clearTimeout(late);
  }
  if (coming !== page) return page.element.remove();
  show(page);
}

async function fillPage(page, runIndex) {
  const { route } = page;
  const runs = await data.runs();
  if (!Number.isInteger(runIndex) || runIndex < 0 || runIndex >= runs.length) {
    throw new data.DataError(
      `There is no run ${route.query.get("run")}; runs are numbered 0 to ${runs.length - 1}.`,
    );
  }
  const run = data.run(runIndex);
  const module = Object.hasOwn(PAGES, route.page) ? PAGES[route.page](run) : null;
  module?.catch(() => {}); // awaited below, once it's known that the run can be read
  page.run = await run;
  if (!module) throw new data.DataError(`There's no page “${route.page}”.`);
  const { render } = await module.catch((error) => {
    console.error(error);
    throw new data.DataError(data.UNREACHABLE);
  });
  const result = await render(page.element, {
    runs,
    run: page.run,
    params: route.params,
    query: route.query,
    navigate: (changes, options) => navigate(page, changes, options),
    live,
    signal: page.controller.signal,
    announce,
  });
  page.update = result?.update ?? null;
}

function show(page) {
  const first = current === null;
  const stayed = current?.route.page === page.route.page;
  coming = null;
  current?.controller.abort();
  current = page;
  progress.hidden = true;
  for (const other of [...main.children]) if (other !== page.element) other.remove();
  page.element.classList.remove("pending");
  drawFrame();
  const heading = page.element.querySelector("h1");
  document.title = [heading?.textContent, page.run?.title, "polyseme"]
    .filter((part, i, parts) => part && parts.indexOf(part) === i)
    .join(" · ");
  const place = left.get(location.hash || "#/");
  const rows = page.element.querySelector(".rows");
  if (rows && place) rows.scrollTop = place.rows;
  window.scrollTo(0, place?.page ?? 0);
  if (first) return;
  if (returned && place?.link) return focusRow(rows, place.link);
  // Screen readers announce the new page; the focus stays in place for the arrow keys.
  const focused = document.activeElement;
  if (!stayed || !focused || focused === document.body) {
    heading?.setAttribute("tabindex", "-1");
    heading?.focus({ preventScroll: true });
  } else if (heading) announce(heading.textContent);
}

/** On return to a table, focuses the row whose link the reader followed. */
function focusRow(rows, href) {
  // Rows are drawn in the frame after the table is scrolled.
  requestAnimationFrame(() => requestAnimationFrame(() => rows?.querySelector(`a[href="${CSS.escape(href)}"]`)?.focus({ preventScroll: true })));
}

function showError(page, error) {
  const known = error instanceof data.DataError;
  if (!known) console.error(error);
  replace(
    page.element,
    h("h1", {}, "This page can’t be shown"),
    h("p", { class: "notice bad" }, known ? error.message : `${error.name}: ${error.message}`),
    h("p", {}, h("a", { href: address("overview", [], { run: page.run?.index }) }, "Go to the overview")),
  );
}

function navigate(page, changes, { replace: inPlace = false } = {}) {
  if (page !== current && page !== coming) return;
  const query = new URLSearchParams(page.route.query);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "") query.delete(name);
    else query.set(name, String(value));
  }
  const hash = address(page.route.page, page.route.params, query);
  if (hash === (location.hash || "#/")) return;
  if (!inPlace) {
    location.hash = hash;
    return;
  }
  history.replaceState(history.state, "", hash);
  main.dataset.at = hash;
  page.route = { ...page.route, query };
}

async function drawFrame() {
  main.dataset.at = location.hash; // the view that is on screen
  const runs = await data.runs().catch(() => []);
  const state = { runs, run: current.run, route: current.route, live };
  header(document.getElementById("top"), state);
  footer(document.getElementById("foot"), state);
}

function announce(text) {
  announcer.textContent = "";
  // Screen readers announce changes, so repeating the same text needs a pause.
  setTimeout(() => (announcer.textContent = text), 50);
}
