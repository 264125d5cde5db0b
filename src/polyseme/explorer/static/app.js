// The explorer's frame: header, routes, theme, keys, focus.
//
// A page is a module pages/NAME.js with
//
//     export async function render(main, ctx)
//
// which fills `main` (an element of its own, laid out but not seen until the promise resolves,
// so that it can be measured; it should hold one <h1>). ctx:
//
//   runs      what data/runs.json lists: [{title, kind}, ...]
//   run       data/I/run.json of the run in the address, and its `index`
//   params    the parts of the path: #/neuron/3/345 -> ["3", "345"]
//   query     URLSearchParams of the address (of the hash, after its "?")
//   navigate  (changes, {replace}) => void: changes parameters of the query; null takes one out.
//             With replace, the address follows what the page already shows: nothing is called.
//             Without, it's a new entry of the history and the page is updated (see below).
//   live      Set of the server's live functions: "probe", "classify", "importances"; empty in an export
//   signal    AbortSignal: aborts when the reader leaves the page
//   announce  (text) => void: tells a screen reader
//
// render may return {update(query)}: then a change of nothing but the query (back, forward,
// navigate) calls that instead of rendering anew. It may return false to be rendered anew.
// A page that wants keys listens on document with ctx.signal and asks `typing(event)` of keys.js first.

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
/** The page on its way. */
let coming = null;
const left = new Map(); // address -> where its reader was: how far down, how far down in its table, at which of its links

let returned = false; // to this view by the browser's back or forward, not by a link

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
      `There's no run ${route.query.get("run")}; the runs here are 0 to ${runs.length - 1}.`,
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
  // Whoever listens hears where they are; whoever goes on with the arrow keys keeps the focus.
  const focused = document.activeElement;
  if (!stayed || !focused || focused === document.body) {
    heading?.setAttribute("tabindex", "-1");
    heading?.focus({ preventScroll: true });
  } else if (heading) announce(heading.textContent);
}

/** Back at a table, the reader goes on from the row that they left by. */
function focusRow(rows, href) {
  // Rows are drawn in the frame after the table is scrolled.
  requestAnimationFrame(() => requestAnimationFrame(() => rows?.querySelector(`a[href="${CSS.escape(href)}"]`)?.focus({ preventScroll: true })));
}

function showError(page, error) {
  const known = error instanceof data.DataError;
  if (!known) console.error(error);
  replace(
    page.element,
    h("h1", {}, "This can't be shown"),
    h("p", { class: "notice bad" }, known ? error.message : `${error.name}: ${error.message}`),
    h("p", {}, h("a", { href: address("overview", [], { run: page.run?.index }) }, "To the overview")),
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
  main.dataset.at = location.hash; // which view this is, now that it's on screen
  const runs = await data.runs().catch(() => []);
  const state = { runs, run: current.run, route: current.route, live };
  header(document.getElementById("top"), state);
  footer(document.getElementById("foot"), state);
}

function announce(text) {
  announcer.textContent = "";
  // A change is what's read out, so the same words twice need a pause between.
  setTimeout(() => (announcer.textContent = text), 50);
}
