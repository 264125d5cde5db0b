// How much each token of an example matters to the activation: stored with the run, or computed
// by the live server on request.

import * as data from "./data.js";
import { h } from "./dom.js";
import { count } from "./format.js";

const NONE = 255;
const SCALE = 254;
const AT_A_TIME = 10;

/** Importances of an example's window, 0 to 1, NaN where missing; null if all are unknown. */
export function windowImportances(tokens, example) {
  const at = example * tokens.width;
  const stored = tokens.importances?.subarray(at, at + tokens.width);
  if (!known(stored)) return null;
  return Array.from(stored, (value) => (value === NONE ? NaN : value / SCALE));
}

/** Computed importances, by run and neuron, kept until the page is closed. */
const computed = new Map();

/**
 * @param {object} neuron as data.js has it; `tokens.importances` is filled in
 * @param {object} ctx see app.js
 * @returns {{notice: (onChange: () => void) => Node | null}} a notice if there are none
 */
export function importancesOf(neuron, ctx) {
  const { tokens, run } = neuron;
  const key = `${run.index}/${neuron.row}`;
  if (!known(tokens.importances) && computed.has(key)) tokens.importances = computed.get(key);
  let working = false;

  async function compute(status, onChange) {
    working = true;
    const values = new Uint8Array(neuron.n * tokens.width).fill(NONE);
    tokens.importances = values;
    try {
      for (let first = 0; first < neuron.n; first += AT_A_TIME) {
        const examples = Array.from({ length: Math.min(AT_A_TIME, neuron.n - first) }, (_, i) => first + i);
        const body = { run: run.index, site: neuron.site.number, neuron: neuron.neuron, examples };
        const answer = await data.live("importances", body, ctx.signal);
        answer.importances.forEach((row, i) => row.forEach((value, column) => {
          if (value !== null) values[(first + i) * tokens.width + column] = Math.round(Math.min(1, Math.max(0, value)) * SCALE);
        }));
        status.textContent = `Computed for ${Math.min(first + AT_A_TIME, neuron.n)} of ${count(neuron.n, "example")}.`;
        onChange();
      }
      computed.set(key, values);
      status.closest(".notice")?.remove();
    } catch (error) {
      tokens.importances = null;
      if (error.name !== "AbortError") status.textContent = error.message;
    } finally {
      working = false;
    }
  }

  return {
    notice(onChange) {
      if (known(tokens.importances) || working) return null;
      if (!ctx.live.has("importances")) {
        return h("p", { class: "notice" },
          "This run has no token importances; to store them, analyse with ", h("code", {}, "--importances exact"), ".");
      }
      const status = h("span", { role: "status" });
      const button = h("button", { type: "button", onclick: () => {
        button.disabled = true;
        compute(status, onChange);
      } }, "Compute them now");
      return h("p", { class: "notice" }, "This run has no token importances. ", button, " ", status);
    },
  };
}

function known(values) {
  return Boolean(values?.some((value) => value !== NONE));
}
