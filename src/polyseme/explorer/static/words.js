// The words of a run on texts, and the meanings and features that match a reader's words.

import * as data from "./data.js";

const MOST_COMPLETIONS = 50; // words whose meanings are fetched for the beginning of a word

/** A text as spelled in the list of words: trimmed and case-folded. */
export function spelling(text) {
  return text.trim().replace(/\s+/g, " ").toLowerCase().replaceAll("ß", "ss").replaceAll("ς", "σ");
}

/** Words of the list with this beginning, in its order. */
export function beginning(words, start) {
  return start ? words.filter((word) => word.startsWith(start)) : [];
}

/** Up to `n` completions of the last word of what is typed, each with the words before it. */
export function completions(words, typed, n) {
  const text = spelling(typed);
  const [, before, last] = text.match(/^(.* )?(.*)$/);
  const whole = beginning(words, text);
  const found = before ? beginning(words, last).map((word) => before + word) : [];
  return [...new Set([...whole, ...found])].filter((word) => word !== text).slice(0, n);
}

/**
 * @typedef {object} Part  of a query
 * @property {string} typed
 * @property {string[]} words  matching words of the list: the word itself or, if it isn't in the list, all that begin with it
 */

/**
 * Meanings or features that match every part of a query. A part that no word begins with is ignored.
 * @param {"meanings" | "features"} kind
 * @returns {Promise<{parts: Part[], unknown: string[], hits: object[]}>}
 */
export async function find(run, vocabulary, q, kind) {
  const known = new Set(vocabulary.words);
  const text = spelling(q);
  const typed = known.has(text) ? [text] : [...new Set(text.split(" "))];
  const all = typed.map((word) => ({ typed: word, words: known.has(word) ? [word] : beginning(vocabulary.words, word).slice(0, MOST_COMPLETIONS) }));
  const parts = all.filter(({ words }) => words.length);
  const unknown = all.filter(({ words }) => !words.length).map((part) => part.typed);
  const number = new Map(vocabulary.words.map((word, i) => [word, i]));
  const lists = await Promise.all(
    parts.map(async ({ words }) => (await Promise.all(words.map((word) => data.wordHits(run, vocabulary.shards[number.get(word)], word, kind)))).flat()),
  );
  const key = (hit) => `${hit.site}/${hit.neuron}/${hit.number}`;
  // A list ends after a hundred hits; hits beyond them can still match by label.
  const sets = lists.map((list) => new Set(list.map(key)));
  const labelled = ({ label }, { typed: word, words }) => spelling(label).split(" ").some((other) => (words[0] === word ? other === word : other.startsWith(word)));
  const every = new Map(lists.flat().map((hit) => [key(hit), hit]));
  const hits = [...every.values()].filter((hit) => parts.every((part, i) => sets[i].has(key(hit)) || labelled(hit, part)));
  // The hits of one word are already ordered; those of several are not.
  if (parts.length > 1 || parts[0]?.words.length > 1) hits.sort((a, b) => b.examples - a.examples);
  return { parts, unknown, hits };
}
