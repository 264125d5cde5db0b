// Classifies an image: what the model predicts, which neurons cause it, and in which of their
// features. Live server only.

import * as data from "../data.js";
import { h, replace, uniqueId } from "../dom.js";
import { count, number, percent } from "../format.js";
import { effectBar } from "../logits.js";
import { Pictures } from "../image-tiles.js";
import { pixels } from "../images.js";
import { neuronName, siteName } from "../lookup.js";
import { badge, colourClass, paletteOf } from "../palette.js";
import { neuronAddress } from "../route.js";
import { Sketch, sketchTools } from "../sketch.js";

const NEURONS_SHOWN = 12;
const CHOICES = 24; // examples of the run to choose from
const PAUSE = 120; // milliseconds without a stroke before the model runs

export async function render(main, ctx) {
  const { run } = ctx;
  if (run.kind !== "image" || !run.image) throw new data.DataError("This run isn't on images, so there is nothing to classify.");
  main.append(h("h1", {}, "Classify"));
  const lead = h("p", { class: "lead" }, "Draw an image or choose an input of the run to see what the model predicts, which neurons cause it, and which of their features the image belongs to.");
  main.append(lead);
  if (!ctx.live.has("classify")) {
    main.append(h("p", { class: "notice" }, "This page needs the model. Open the run with it: ",
      h("code", {}, "polyseme explore RUN --model MODEL"), "."));
    return null;
  }
  const page = new Classify(ctx);
  main.append(page.element);
  page.update(ctx.query);
  return { update: (query) => page.update(query) };
}

class Classify {
  constructor(ctx) {
    this.ctx = ctx;
    const { run } = ctx;
    this.sketch = new Sketch(run.image.thumb, () => this._drawn());
    this.status = h("p", { role: "status", class: "probe-status" }, "Draw something.");
    this.outcome = h("div", { class: "outcome" });
    this.neurons = h("div", { class: "classify-neurons" });
    this.answer = null;
    this.chosen = null; // class
    this.input = null; // index in the data, or null for a drawing
    this.timer = 0;
    this.asked = 0;
    this.element = h("div", { class: "classify" },
      h("section", { class: "card classify-input" },
        h("header", {}, h("h2", {}, "Image"), sketchTools(this.sketch, () => this._cleared())),
        this.sketch.canvas, this._chooser()),
      h("div", { class: "classify-output" },
        h("section", { class: "card" }, h("header", {}, h("h2", {}, "Prediction")), this.status, this.outcome),
        this.neurons));
  }

  /** Inputs of the run to choose instead of drawing, by number or by picture. */
  _chooser() {
    const { run } = this.ctx;
    const id = uniqueId("input");
    const field = h("input", { id, type: "number", min: 0, step: 1 });
    const tiles = h("ul", { class: "tiles" });
    const form = h("form", { class: "classify-number", onsubmit: (event) => {
      event.preventDefault();
      if (field.value !== "") this.ctx.navigate({ input: field.value });
    } }, h("label", { for: id }, "Input of the run"), field, h("button", { type: "submit" }, "Use"),
    h("button", { type: "button", onclick: () => this._offer(tiles) }, "Show others"));
    this.field = field;
    this._offer(tiles);
    return h("div", { class: "classify-choices" }, form, tiles, h("p", { class: "quiet-text small" }, "Some examples of ", h("bdi", {}, run.title), "."));
  }

  async _offer(tiles) {
    const { run } = this.ctx;
    try {
      const inputs = new Map();
      // A neuron may be dead, so try several.
      for (let attempt = 0; attempt < 12 && inputs.size < CHOICES; attempt++) {
        const one = await data.neuron(run, Math.floor(Math.random() * run.n_neurons));
        if (!one.examples.thumb) continue; // damaged
        const all = Array.from({ length: one.n }, (_, i) => i).sort(() => Math.random() - 0.5);
        for (const example of all.slice(0, CHOICES / 4)) inputs.set(one.examples.inputNumber[example], one.thumbs.of(one.examples.thumb[example]));
      }
      replace(tiles, [...inputs].slice(0, CHOICES).map(([input, thumb]) =>
        h("li", {}, h("button", { type: "button", class: "tile", "aria-label": `Input ${input}`, onclick: () => this.ctx.navigate({ input }) },
          pixels(thumb, run.image.thumb)))));
    } catch (error) {
      if (!(error instanceof data.DataError)) throw error;
      replace(tiles, h("li", { class: "notice bad" }, error.message));
    }
  }

  update(query) {
    const wanted = query.get("class");
    this.chosen = wanted === null ? null : Number(wanted);
    const input = query.has("input") ? Number(query.get("input")) : null;
    if (input !== null && input !== this.input) {
      this.input = input;
      this.field.value = input;
      this._ask({ index: input });
    } else if (this.answer) {
      this._show();
    }
  }

  _drawn() {
    if (this.input !== null) {
      this.input = null;
      this.field.value = "";
      this.ctx.navigate({ input: null }, { replace: true });
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this._ask({ pixels: Array.from(this.sketch.values, (v) => Number(v.toFixed(4))) }), PAUSE);
  }

  _cleared() {
    clearTimeout(this.timer);
    this.asked += 1;
    this.answer = null;
    this.input = null;
    this.field.value = "";
    this.ctx.navigate({ input: null, class: null }, { replace: true });
    this.chosen = null;
    replace(this.outcome);
    replace(this.neurons);
    this.status.textContent = "Draw something.";
  }

  async _ask(question) {
    const turn = (this.asked += 1);
    if (!this.answer) this.status.textContent = "Running the model, which is loaded on first use…";
    try {
      const answer = await data.live("classify", { run: this.ctx.run.index, ...question }, this.ctx.signal);
      // A later stroke has sent its own request.
      if (turn !== this.asked) return;
      if (question.index !== undefined) this.sketch.set(answer.pixels);
      this.answer = answer;
      this._show();
    } catch (error) {
      if (error.name === "AbortError" || turn !== this.asked) return;
      this.answer = null;
      replace(this.outcome);
      replace(this.neurons);
      this.status.textContent = error.message;
    }
  }

  _name(c) {
    return this.ctx.run.image.class_names?.[c] ?? String(c);
  }

  get _class() {
    const { answer, chosen } = this;
    return Number.isInteger(chosen) && chosen >= 0 && chosen < answer.logits.length ? chosen : answer.predicted;
  }

  _show() {
    const { answer } = this;
    const truth = answer.label === null ? "" : ` Its class in the data is ${this._name(answer.label)}.`;
    this.status.textContent = `${this._name(answer.predicted)}, with probability ${percent(answer.probabilities[answer.predicted])}.${truth}`;
    const order = answer.logits.length <= NEURONS_SHOWN
      ? Array.from(answer.logits.keys())
      : Array.from(answer.logits.keys()).sort((a, b) => answer.logits[b] - answer.logits[a]).slice(0, NEURONS_SHOWN);
    replace(this.outcome, h("div", { class: "classes", role: "group", "aria-label": "Classes; choose one to see its neurons" }, order.map((c) =>
      h("button", {
        type: "button", class: "class-row", "aria-pressed": String(c === this._class), dataset: { class: c },
        onclick: () => {
          this.ctx.navigate({ class: c === answer.predicted ? null : c });
          this.outcome.querySelector(`[data-class="${c}"]`)?.focus();
        },
      },
      h("bdi", { class: "class-name" }, this._name(c)),
      h("span", { class: "share", "aria-hidden": "true" }, h("span", { style: { width: `${(100 * answer.probabilities[c]).toFixed(2)}%` } })),
      h("span", { class: "num" }, percent(answer.probabilities[c])),
      h("span", { class: "num quiet-text small" }, `logit ${number(answer.logits[c])}`)))));
    this._showNeurons(this._class);
  }

  _showNeurons(c) {
    const rows = this.answer.neurons.filter((row) => row.contributions[c] !== null)
      .sort((a, b) => Math.abs(b.contributions[c]) - Math.abs(a.contributions[c])).slice(0, NEURONS_SHOWN);
    const most = Math.max(1e-9, ...rows.map((row) => Math.abs(row.contributions[c])));
    replace(this.neurons, h("section", { class: "card" },
      h("header", {}, h("h2", {}, "Neurons that matter for ", h("bdi", {}, this._name(c)))),
      h("p", { class: "quiet-text small" }, this.answer.method),
      rows.length ? h("ol", { class: "contributors" }, rows.map((row) => this._contributor(row, c, most)))
        : h("p", {}, "No neuron of the run contributes to this logit.")));
    this._totals(c);
  }

  _contributor(row, c, most) {
    const { run } = this.ctx;
    const site = run.sites.find((s) => s.number === row.site);
    const near = row.feature >= 0;
    const place = near ? paletteOf(row.feature, row.n_examples) : -1;
    const href = neuronAddress(run, row.site, row.neuron, { feature: near && row.n_examples > 1 ? row.feature : null });
    const picture = h("span", { class: "contributor-picture" });
    if (near) this._average(row, picture);
    return h("li", { class: `contributor ${colourClass(place)}` },
      picture,
      h("div", { class: "contributor-said" },
        h("a", { href, title: siteName(run, site) }, neuronName(run, site, row.neuron)),
        near
          ? h("span", {}, "feature ", badge(row.feature, place), row.label !== "" ? [", mostly ", h("b", {}, h("bdi", {}, row.label))] : h("small", { class: "quiet-text" }, `, ${count(row.n_examples, "example")}`))
          : h("span", { class: "quiet-text" }, "not close to any of its features")),
      h("div", { class: "contributor-effect" }, effectBar(row.contributions[c], most),
        h("span", { class: "num" }, `${row.contributions[c] > 0 ? "+" : ""}${number(row.contributions[c], 3)}`),
        h("small", { class: "quiet-text" }, `activation ${number(row.activation)}`)));
  }

  /** The average of a feature's examples. */
  async _average(row, place) {
    const { run } = this.ctx;
    try {
      const one = await data.neuron(run, data.rowOf(run, row.site, row.neuron));
      if (!one.examples.thumb) return; // a damaged pack has no picture
      const members = Array.from(one.examples.feature.keys()).filter((i) => one.examples.feature[i] === row.feature);
      const { average, averageShape } = new Pictures(one).average(members);
      place.append(pixels(average, averageShape, `Average of feature ${row.feature}`));
    } catch (error) {
      if (!(error instanceof data.DataError)) throw error; // nor has one that can't be loaded
    }
  }

  _totals(c) {
    const totals = (this.answer.totals ?? []).filter((total) => total.contributions[c] !== null);
    if (!totals.length) return;
    this.neurons.firstChild.append(h("p", { class: "quiet-text small" }, totals.map((total) => {
      const site = this.ctx.run.sites.find((s) => s.number === total.site);
      return [h("bdi", {}, siteName(this.ctx.run, site)), `: ${count(total.active, "active neuron")} add ${number(total.contributions[c])} in total. `];
    })));
  }
}
