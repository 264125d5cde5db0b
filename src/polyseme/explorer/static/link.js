// Links the parts of a neuron's page: the example under the pointer is highlighted in all of
// them, and a chosen example is opened.

/**
 * @param {(example: number | null) => void} choose
 */
export function links(choose) {
  const listeners = new Set();
  let pointed = null;
  return {
    /** Points at an example, or at none. */
    point(example) {
      if (example === pointed) return;
      pointed = example;
      for (const listener of listeners) listener(example);
    },
    choose,
    onPoint(signal, listener) {
      listeners.add(listener);
      signal.addEventListener("abort", () => listeners.delete(listener));
    },
  };
}
