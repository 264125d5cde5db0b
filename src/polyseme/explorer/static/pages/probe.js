// Probes a text of the reader's: which neurons each token activates, in which meanings. Live server only.

import * as data from "../data.js";
import { h, replace, uniqueId } from "../dom.js";
import { count, number, percent } from "../format.js";
import { neuronName, siteName } from "../lookup.js";
import { badge, marker, paletteOf } from "../palette.js";
import { neuronAddress } from "../route.js";
import { direction, plain, shaded } from "../tokens.js";

const LONGEST = 10_000; // characters that the server takes
const TRY = "They sat on the bank of the river. The bank raised its rates again.";
const STRONGEST = 20; // rows when no token is chosen

export async function render(main, ctx) {
  const { run } = ctx;
  if (run.kind !== "text") throw new data.DataError("This run is on images, so it can't be probed with a text.");
  main.append(h("h1", {}, "Probe"));
  if (!ctx.live.has("probe")) {
    main.append(
      h("p", { class: "lead" }, "Enter a text to see which neurons each token activates, and in which of their meanings."),
      h("p", { class: "notice" }, "This page needs the model. Open the run with it: ",
        h("code", {}, "polyseme explore RUN --model MODEL"), "."));
    return null;
  }
  const field = h("textarea", {
    id: uniqueId("text"), rows: 3, maxlength: LONGEST, spellcheck: "false", autocomplete: "off", placeholder: TRY, dir: "auto",
  });
  const status = h("p", { class: "probe-status", role: "status" });
  const result = h("div", { class: "probe-result" });
  const button = h("button", { class: "primary", type: "submit" }, "Probe");
  const form = h("form", { class: "probe-form", onsubmit: submit },
    h("label", { for: field.id }, "Text"), field,
    h("div", { class: "probe-buttons" }, button,
      h("button", { type: "button", class: "quiet", onclick: () => ctx.navigate({ q: TRY, token: null }) }, "Try an example")));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  main.append(
    h("p", { class: "lead" }, "Enter a text to see which neurons each token activates, and in which of their meanings. The number next to a meaning is the mean cosine with its examples, at most 1. Neurons are ranked by the share of their own maximum in the run, so that neurons with large activations don't always come first."),
    form, status, result);

  let asked = null;
  let view = null;

  function submit(event) {
    event.preventDefault();
    const q = field.value || TRY;
    if (q === asked) ask(q);
    else ctx.navigate({ q, token: null });
  }

  async function ask(q) {
    asked = q;
    view = null;
    button.disabled = true;
    status.textContent = "Running the model… The first text takes up to a minute, because the model has to be loaded.";
    try {
      const answer = await data.live("probe", { run: run.index, text: q }, ctx.signal);
      if (asked !== q) return;
      view = new Probed(answer, ctx);
      status.textContent = `${count(answer.tokens.length, "token")}.${answer.truncated ? " Only the beginning of the text was read." : ""}`;
      replace(result, view.element);
    } catch (error) {
      if (error.name === "AbortError") return;
      asked = null;
      replace(result);
      status.textContent = error.message;
    } finally {
      button.disabled = false;
    }
  }

  async function update(query) {
    const q = query.get("q") ?? "";
    if (q && q !== asked) {
      field.value = q;
      await ask(q);
    } else if (!q) {
      asked = null;
      view = null;
      replace(result);
      status.textContent = "";
    }
    view?.choose(query.has("token") ? Number(query.get("token")) : null);
  }
  update(ctx.query); // the form is shown at once, the answer when it arrives
  return { update: (query) => void update(query) };
}

/** An answer from the server: the tokens, and the neurons at the chosen one. */
class Probed {
  constructor(answer, ctx) {
    this.answer = answer;
    this.ctx = ctx;
    this.chosen = null;
    this.at = answer.tokens.map(() => []);
    for (const row of answer.active) this.at[row.token].push(row);
    const strongest = this.at.map((rows) => Math.max(0, ...rows.map((row) => row.share ?? 0)));
    // With many neurons, one exceeds its maximum at nearly every token; only the amount differs.
    const most = Math.max(1, ...strongest);
    this.strongest = strongest.map((share) => share / most);
    this.cells = [];
    this.text = this._tokens();
    this.panel = h("section", { class: "card probe-neurons", "aria-live": "off" });
    this.element = h("div", { class: "probe-answer" }, h("section", { class: "card" }, h("header", {}, h("h2", {}, "Tokens")), this.text,
      h("p", { class: "quiet-text small" }, "Shading shows the most active neuron’s share of its maximum, relative to the rest of the text. Click a token to see its neurons; the arrow keys move along the text.")), this.panel);
    this._shade(null);
  }

  _tokens() {
    const { tokens, left_out: leftOut } = this.answer;
    const nodes = shaded(tokens, { shares: this.strongest });
    const list = h("div", { class: "probe-tokens", role: "listbox", "aria-label": "Tokens of the text", "aria-orientation": "horizontal", dir: direction(tokens.join("")), dataset: { keys: "" } }, nodes);
    this.cells = nodes.filter((node) => node.dataset);
    this.cells.forEach((cell, i) => {
      cell.setAttribute("role", "option");
      cell.setAttribute("aria-selected", "false");
      cell.tabIndex = i === 0 ? 0 : -1;
      if (leftOut[i]) {
        cell.classList.add("left-out");
        cell.title = "left out of the run, so no neurons are listed here";
      }
    });
    list.addEventListener("click", (event) => {
      const cell = event.target.closest(".t");
      if (cell) this._go(Number(cell.dataset.t), true);
    });
    list.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const focused = this.cells.indexOf(document.activeElement);
      if (event.key === "Enter" || event.key === " ") this._go(focused, true);
      else if (event.key === "Escape") this._go(null);
      else if (step) this._go(Math.max(0, Math.min(this.cells.length - 1, focused + (list.dir === "rtl" ? -step : step))));
      else return;
      event.preventDefault();
    });
    return list;
  }

  _go(token, toggle = false) {
    const next = toggle && token === this.chosen ? null : token;
    this.ctx.navigate({ token: next }, { replace: true });
    this.choose(next);
    if (next !== null) this.cells[next].focus();
  }

  /** Shows the neurons at a token, or the strongest in the whole text. */
  choose(token) {
    const valid = token !== null && token >= 0 && token < this.cells.length ? token : null;
    this.chosen = valid;
    this.cells.forEach((cell, i) => {
      cell.setAttribute("aria-selected", String(i === valid));
      cell.tabIndex = i === (valid ?? 0) ? 0 : -1;
    });
    const rows = valid === null
      ? this.answer.active.toSorted((a, b) => (b.share ?? 0) - (a.share ?? 0)).slice(0, STRONGEST)
      : this.at[valid];
    const title = valid === null ? "Strongest in the whole text" : ["Neurons at ", h("bdi", { class: "chip-token" }, plain(this.answer.tokens[valid]))];
    const beyond = rows.some((row) => row.share > 1) && h("p", { class: "quiet-text small" }, "Over 100%: stronger than anything in the run. The mark on the bar is at 100%.");
    replace(this.panel, h("header", {}, h("h2", {}, title)), beyond, rows.length ? this._table(rows, valid === null) : h("p", {}, this._none(valid)));
  }

  _none(token) {
    return token !== null && this.answer.left_out[token]
      ? "The run leaves out tokens like this one: special tokens, or the first token of a context."
      : "No neuron of the run is active here.";
  }

  _table(rows, withToken) {
    const { run } = this.ctx;
    const most = Math.max(1, ...rows.map((row) => row.share ?? 0)); // the full length of a bar
    const known = this.answer.active.some((row) => row.meaning >= 0); // otherwise the run has no meanings
    const head = [withToken && "Token", "Neuron", "Share of its maximum", "Activation", known && "Meaning", "Feature"].filter(Boolean);
    return h("div", { class: "scroll-x" }, h("table", { class: "plain probe-table" },
      h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col", class: name === "Activation" ? "num activation" : null }, name)))),
      h("tbody", {}, rows.map((row) => {
        const site = run.sites.find((s) => s.number === row.site);
        const href = neuronAddress(run, row.site, row.neuron, { feature: row.feature >= 0 && row.n_examples > 1 ? row.feature : null });
        const shade = (on) => this._shade(on ? row : null);
        return h("tr", { onpointerenter: () => shade(true), onpointerleave: () => shade(false), onfocusin: () => shade(true), onfocusout: () => shade(false) },
          withToken && h("td", {}, h("button", { type: "button", class: "link", onclick: () => this._go(row.token) }, h("bdi", {}, plain(this.answer.tokens[row.token])))),
          h("th", { scope: "row" }, h("a", { href, title: `${siteName(run, site)}, neuron ${row.neuron}` }, neuronName(run, site, row.neuron))),
          h("td", { class: "share-cell" }, shareBar(row.share ?? 0, most), row.share === null ? "–" : percent(row.share)),
          h("td", { class: "num activation" }, number(row.activation)),
          known && h("td", {}, this._meaning(row)),
          h("td", { class: "which" }, this._feature(row)));
      }))));
  }

  _meaning(row) {
    const near = Number.isFinite(row.meaning_cosine) && h("small", { class: "quiet-text", title: "Mean cosine with the examples of the nearest meaning" }, ` ${row.meaning_cosine.toFixed(2).replace("-", "−")}`);
    if (!(row.meaning >= 0)) return h("span", { class: "quiet-text" }, "not close to any", near);
    const href = neuronAddress(this.ctx.run, row.site, row.neuron, { meaning: row.meaning });
    return [h("a", { href, class: "probe-meaning", "aria-label": `Meaning ${row.meaning}` }, badge(row.meaning, paletteOf(row.meaning, 2))), near];
  }

  _feature(row) {
    if (row.feature < 0) return h("span", { class: "quiet-text" }, "not close to any of its features");
    const place = paletteOf(row.feature, row.n_examples);
    return h("span", { class: `probe-feature f${place < 0 ? "-rest" : place}` }, marker(place), h("b", {}, row.feature),
      h("bdi", {}, row.label), h("small", { class: "quiet-text" }, count(row.n_examples, "example")));
  }

  /** Shades the text by one neuron where it is listed, or by the strongest neuron at each token. */
  _shade(row) {
    this.cells.forEach((cell, i) => {
      const share = row
        ? this.at[i].find((other) => other.site === row.site && other.neuron === row.neuron)?.share ?? 0
        : this.strongest[i];
      for (const name of [...cell.classList]) if (/^s\d+$/.test(name)) cell.classList.remove(name);
      const level = Math.min(10, Math.ceil(Math.min(1, share) * 10));
      if (level > 0) cell.classList.add(`s${level}`);
    });
  }
}

/** A bar for a share, with a mark at 100% if the share is larger. */
function shareBar(share, most) {
  const long = (value) => `${((100 * value) / most).toFixed(1)}%`;
  return h("span", { class: "share", "aria-hidden": "true" }, h("span", { style: { width: long(share) } }), share > 1 && h("i", { style: { left: long(1) } }));
}
