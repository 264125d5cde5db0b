// Tokens, shown faithfully: whitespace that a reader would miss, partial characters and invisible
// characters are marked; everything else is shown as is.

import { h } from "./dom.js";

const BYTE = /^(?:<0x[0-9A-F]{2}>)+$/;
// Characters that are invisible, or change the layout of the text around them: controls,
// bidirectional overrides and isolates, zero-width characters, tags, lone surrogates.
const UNSEEN =
  /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]|\p{Surrogate}/u;
// Between letters these affect shaping (Persian, Indic scripts, emoji); elsewhere they're invisible.
const JOINERS = /[\u200c\u200d]/;
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/g;
const LETTER = /\p{L}/gu;

/**
 * A token's text in pieces: what is shown and, for a mark, what it stands for, in words and raw.
 *
 * @param {string} text
 * @param {boolean} [alone] whether no other text surrounds it, so that spaces at its ends would be missed
 * @returns {{shown: string, mark?: string, raw?: string}[]}
 */
export function pieces(text, alone = false) {
  if (text === "") return [{ shown: "∅", mark: "an empty token", raw: "" }];
  if (BYTE.test(text)) {
    return text
      .match(/<0x[0-9A-F]{2}>/g)
      .map((byte) => ({ shown: byte.slice(3, 5), mark: `byte 0x${byte.slice(3, 5)}, part of a character`, raw: byte }));
  }
  const found = [];
  const blank = (alone || text.length > 1) && text.trim() === "";
  const characters = [...text];
  characters.forEach((character, index) => {
    const plain = found.at(-1);
    const missed = blank || spaceWouldBeMissed(characters, index, alone);
    const joins = index > 0 && index < characters.length - 1;
    const mark = markOf(character, missed, joins);
    if (mark) found.push({ ...mark, raw: character });
    else if (plain && !plain.mark) plain.shown += character;
    else found.push({ shown: character });
  });
  return found;
}

function spaceWouldBeMissed(characters, index, alone) {
  const beside = characters[index - 1] === " " || characters[index + 1] === " ";
  const first = index === 0;
  const last = index === characters.length - 1;
  return beside || (last && !first) || (alone && first);
}

function markOf(character, missed, joins) {
  if (character === "\n") return { shown: "⏎", mark: "new line" };
  if (character === "\t") return { shown: "⇥", mark: "tab" };
  if (character === "\r") return { shown: "␍", mark: "carriage return" };
  if (character === " ") return missed ? { shown: "·", mark: "space" } : null;
  if (!UNSEEN.test(character) && (joins || !JOINERS.test(character))) return null;
  const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  return { shown: code, mark: `U+${code}` };
}

/** A token as one line of plain text, for a name or a title. */
export function plain(text) {
  return pieces(text)
    .map(({ shown, mark }) => (mark?.startsWith("U+") || mark?.startsWith("byte") ? `⟨${shown}⟩` : shown))
    .join("");
}

/** Nodes of a token's text, with marks as separate elements. */
export function tokenNodes(text, alone = false) {
  return pieces(text, alone).map(({ shown, mark, raw }) => (mark ? h("span", { class: "mark", title: mark, dataset: { raw } }, shown) : shown));
}

/** A single token in a frame: distinctive tokens, logit effects. */
export function tokenChip(text, attributes = {}) {
  return h("bdi", { ...attributes, class: `chip-token ${attributes.class ?? ""}`.trim() }, tokenNodes(text, true));
}

/** "rtl" where most letters are written from right to left, else "ltr". */
export function direction(text) {
  const back = (text.match(RIGHT_TO_LEFT) ?? []).length;
  return 2 * back > (text.match(LETTER) ?? []).length ? "rtl" : "ltr";
}

/**
 * Whether a vocabulary is of WordPieces: words carry no space, and continuations begin with
 * "##".
 */
export function hasImpliedSpaces(vocabulary) {
  return vocabulary.some((text) => text.startsWith("##")) && !vocabulary.some((text) => /^\s\S/.test(text));
}

const LEVELS = 10;

/** Class of a token's shade: nothing at 0 and beyond the context, s1 to s10 above. */
export function shadeClass(share) {
  if (!(share > 0)) return "";
  return ` s${Math.min(LEVELS, Math.max(1, Math.ceil(share * LEVELS)))}`;
}

/**
 * A stretch of tokens, each shaded.
 *
 * @param {string[]} tokens
 * @param {object} options
 * @param {ArrayLike<number>} [options.shares] shade of each, 0 to 1; NaN if unknown
 * @param {number} [options.centre] which token the example is
 * @param {boolean} [options.implied] see `hasImpliedSpaces`
 * @param {number} [options.first] number of the first token, as `data-t` says it
 * @returns {HTMLElement[]} one span per token
 */
export function shaded(tokens, { shares, centre = -1, implied = false, first = 0 }) {
  const nodes = [];
  tokens.forEach((text, index) => {
    const space = implied && index > 0 && !text.startsWith("##");
    if (space) nodes.push(" ");
    const kind = index === centre ? " centre" : "";
    // A lone space is visible between words, but not next to a word's own space, nor as the centre.
    const alone = text === " " && (index === centre || /^\s/.test(tokens[index + 1] ?? " ") || /\s$/.test(tokens[index - 1] ?? ""));
    nodes.push(
      h("span", { class: `t${kind}${shadeClass(shares?.[index])}`, dataset: { t: first + index } }, tokenNodes(text, alone)),
    );
  });
  return nodes;
}
