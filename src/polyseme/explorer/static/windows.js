// Examples in texts, one line each, with the activating tokens aligned as in a concordance; and the
// whole context of the open example.

import * as data from "./data.js";
import { number, whole } from "./format.js";
import { h, replace } from "./dom.js";
import { windowImportances } from "./importances.js";
import { hideTip, showTip } from "./tip.js";
import { direction, hasImpliedSpaces, plain, shaded } from "./tokens.js";

/**
 * The example lines of one neuron. A line is created once and moved when the features change.
 *
 * @param {object} neuron as data.js has it
 * @param {object} options
 * @param {object} options.link see link.js
 * @param {AbortSignal} options.signal
 */
export function exampleLines(neuron, { link, signal }) {
  const { tokens, examples, run } = neuron;
  const implied = hasImpliedSpaces(tokens.vocabulary);
  const lines = new Map();
  let shade = "activation";
  let open = null;

  /** Shades of an example's window, 0 to 1; null if unknown. */
  function sharesOf(example, kind = shade) {
    if (kind === "activation") {
      const at = example * tokens.width;
      return tokens.shares?.subarray(at, at + tokens.width) ?? null;
    }
    return windowImportances(tokens, example);
  }

  function make(example) {
    const words = data.windowOf(tokens, example);
    const first = words.findIndex((word) => word !== null);
    const spans = { tokens: words.map((word) => word ?? ""), inside: words.map((word) => word !== null) };
    const way = direction(spans.tokens.join(""));
    const before = h("span", { class: "before" });
    const after = h("span", { class: "after" });
    const mark = h("span", { class: "line-mark" });
    const choose = () => link.choose(open === example ? null : example);
    const value = number(examples.activation[example]);
    const button = h("button", {
      type: "button", class: "line-value", "aria-expanded": "false", title: "Show the whole context",
      "aria-label": `Activation ${value}: show the whole context`, onclick: choose,
    }, value);
    // The text can be selected, so it isn't a button; clicking it does the same.
    const text = h("span", { class: "kwic", dir: way, onclick: () => getSelection().isCollapsed && choose() }, before, after);
    const element = h("li", { class: "line", dataset: { e: example } }, mark, button, text);
    const line = { element, mark, button, before, after, words: spans, first, shaded: null };
    lines.set(example, line);
    return line;
  }

  function paint(example, line) {
    const key = `${shade}:${shade === "importance" && sharesOf(example) !== null}`;
    if (line.shaded === key) return;
    line.shaded = key;
    const shares = sharesOf(example) ?? [];
    const stop = line.words.inside.lastIndexOf(true) + 1;
    const part = (from, to) =>
      shaded(line.words.tokens.slice(from, to), {
        shares: Array.from(shares.slice(from, to)), centre: tokens.before - from, implied, first: from,
      });
    replace(line.before, h("span", {}, part(line.first, tokens.before), gap(line, tokens.before)));
    replace(line.after, part(tokens.before, stop));
    line.element.classList.toggle("by-importance", shade === "importance");
  }

  function gap(line, at) {
    return implied && at > line.first && !line.words.tokens[at].startsWith("##") ? " " : null;
  }

  /** What a tooltip says about a token of an example's window. */
  function sayToken(example, index) {
    const share = tokens.shares?.[example * tokens.width + index];
    const importance = sharesOf(example, "importance")?.[index];
    const parts = [];
    if (share !== undefined && !Number.isNaN(share)) {
      parts.push(`activation ${number(share * examples.activation[example])}`);
    }
    if (importance !== undefined && !Number.isNaN(importance)) parts.push(`importance ${number(importance)}`);
    return { word: plain(data.windowOf(tokens, example)[index] ?? ""), value: parts.join(", ") || "outside the window" };
  }

  async function expand(example, line) {
    const panel = h("div", { class: "context-panel" }, h("p", { class: "quiet-text" }, "Loading the context…"));
    line.panel = panel;
    line.element.append(panel);
    line.button.setAttribute("aria-expanded", "true");
    line.element.classList.add("open");
    try {
      const { tokens: all, number: place } = await data.context(run, examples.input[example]);
      if (signal.aborted || line.panel !== panel) return;
      fillContext(panel, example, all, place);
    } catch (error) {
      if (error.name !== "AbortError") replace(panel, h("p", { class: "notice bad" }, error.message));
    }
  }

  function fillContext(panel, example, all, place) {
    const centre = examples.position[example];
    const from = Math.max(0, centre - tokens.before);
    const skipped = tokens.before - (centre - from);
    const shares = sharesOf(example) ?? [];
    const known = Array.from({ length: all.length }, (_, t) => {
      const column = t - from + skipped;
      return t >= from && column < tokens.width ? shares[column] : NaN;
    });
    const spans = shaded(all, { shares: known, centre, implied });
    let at = centre;
    const text = h("div", {
      class: `context${shade === "importance" ? " by-importance" : ""}`,
      dir: direction(all.join("")), role: "group", tabindex: 0, dataset: { keys: "" },
      "aria-label": "The whole context; left and right arrow keys move through its tokens",
    }, spans);
    const cells = spans.filter((node) => node.dataset);
    const go = (next) => {
      cells[at]?.classList.remove("cursor");
      at = Math.max(0, Math.min(all.length - 1, next));
      cells[at].classList.add("cursor");
      const column = at - centre + tokens.before;
      const known = column >= 0 && column < tokens.width;
      const { word, value } = known ? sayToken(example, column) : { word: plain(all[at]), value: "outside the window" };
      tipBeside(cells[at], h("strong", {}, word), ` ${value}`);
      said.textContent = `${word}: ${value}`;
    };
    text.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      go(at + (text.dir === "rtl" ? -step : step));
    });
    text.addEventListener("blur", () => {
      cells[at]?.classList.remove("cursor");
      hideTip();
    });
    text.addEventListener("pointerover", (event) => {
      const cell = event.target.closest?.(".t");
      if (cell) hoverToken(cell, example, Number(cell.dataset.t) - centre + tokens.before);
    });
    text.addEventListener("pointerleave", hideTip);
    const said = h("p", { class: "visually-hidden", "aria-live": "polite" });
    replace(panel, text, said, h("p", { class: "context-said" }, copyButton(all), " ",
      `Input ${whole(place)}, token ${whole(centre)}: activation ${number(examples.activation[example])}. `,
      `Shading covers the ${tokens.before} tokens before it and the ${tokens.width - 1 - tokens.before} after it.`));
  }

  function hoverToken(cell, example, column) {
    if (column < 0 || column >= tokens.width) return hideTip();
    const { word, value } = sayToken(example, column);
    tipBeside(cell, h("strong", {}, word), ` ${value}`);
  }

  function collapse(example) {
    const line = lines.get(example);
    if (!line?.panel) return;
    line.panel.remove();
    line.panel = null;
    line.button.setAttribute("aria-expanded", "false");
    line.element.classList.remove("open");
  }

  link.onPoint(signal, (example) => {
    for (const [other, line] of lines) line.element.classList.toggle("pointed", other === example);
  });
  signal.addEventListener("abort", hideTip);

  return {
    /** The line of an example in its current state, with a mark if no heading names its feature. */
    line(example, mark = null) {
      const line = lines.get(example) ?? make(example);
      paint(example, line);
      replace(line.mark, mark);
      return line.element;
    },
    /** The element of an example's line. */
    element: (example) => (lines.get(example) ?? make(example)).element,
    /** Sets what the shading shows; lines are repainted when they are next requested. */
    setShade(next) {
      if (shade === next) return;
      shade = next;
      if (open === null) return;
      collapse(open);
      expand(open, lines.get(open));
    },
    /** Opens one example's context and closes the other; null closes it. */
    open(example) {
      if (open === example) return;
      if (open !== null) collapse(open);
      open = example;
      if (example !== null) expand(example, lines.get(example) ?? make(example));
    },
    /** Listens on an element that holds lines. */
    listen(element) {
      element.addEventListener("pointerover", (event) => {
        const line = event.target.closest?.(".line[data-e]");
        if (!line) return;
        const example = Number(line.dataset.e);
        link.point(example);
        const cell = event.target.closest(".kwic .t");
        if (cell) hoverToken(cell, example, Number(cell.dataset.t));
        else if (!event.target.closest(".context")) hideTip();
      });
      element.addEventListener("pointerleave", () => {
        link.point(null);
        hideTip();
      });
      element.addEventListener("focusin", (event) => {
        const line = event.target.closest?.(".line[data-e]");
        if (line) link.point(Number(line.dataset.e));
      });
      element.addEventListener("focusout", () => link.point(null));
      element.addEventListener("copy", (event) => {
        event.preventDefault();
        event.clipboardData.setData("text/plain", selectedText());
      });
    },
  };
}

/** The selected example texts, one line each: the raw text, without marks or values. */
function selectedText() {
  const found = getSelection().getRangeAt(0).cloneContents();
  for (const mark of found.querySelectorAll("[data-raw]")) mark.replaceWith(mark.dataset.raw);
  const texts = found.querySelectorAll(".kwic, .context, .chip-token");
  return texts.length ? Array.from(texts, (text) => text.textContent).join("\n") : found.textContent;
}

/** A button that copies a text, if the page may: on localhost or over https. */
function copyButton(words) {
  if (!navigator.clipboard) return null;
  const button = h("button", { type: "button", class: "link", onclick: async () => {
    try {
      await navigator.clipboard.writeText(words.join(""));
      button.textContent = "Copied";
    } catch (error) {
      button.textContent = `Not copied: ${error.message}`;
    }
  } }, "Copy text");
  return button;
}

/** A short stretch of text that can't be opened: random examples, samples of similar features. */
export function textSample(words, centre, { shares = null, implied = false } = {}) {
  const first = words.findIndex((word) => word !== null);
  const stop = words.findLastIndex((word) => word !== null) + 1;
  const shown = words.map((word) => word ?? "");
  const part = (from, to) =>
    shaded(shown.slice(from, to), { shares: shares && Array.from(shares.slice(from, to)), centre: centre - from, implied });
  const space = implied && centre > first && !shown[centre].startsWith("##") ? " " : null;
  return h("span", { class: "kwic", dir: direction(shown.join("")) },
    h("span", { class: "before" }, h("span", {}, part(first, centre), space)),
    h("span", { class: "after" }, part(centre, stop)));
}

function tipBeside(cell, ...content) {
  const { left, bottom } = cell.getBoundingClientRect();
  showTip(left - 14, bottom - 10, ...content);
}
