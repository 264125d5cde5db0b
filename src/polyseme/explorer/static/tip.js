// One tooltip for the whole page. Its content is always available elsewhere too (a label, a table).

import { h, replace } from "./dom.js";

let box = null;

/** Shows `content` (nodes or strings) next to a position in the window. */
export function showTip(x, y, ...content) {
  if (!box) {
    box = h("div", { class: "tip", "aria-hidden": "true" });
    document.body.append(box);
    window.addEventListener("hashchange", hideTip);
    window.addEventListener("scroll", hideTip, { passive: true, capture: true });
    document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  }
  replace(box, ...content);
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  const left = Math.max(6, Math.min(x + 14, window.innerWidth - width - 6));
  const top = y + 18 + height > window.innerHeight ? y - height - 12 : y + 18;
  box.style.setProperty("left", `${left}px`);
  box.style.setProperty("top", `${Math.max(6, top)}px`);
}

export function hideTip() {
  if (box) box.hidden = true;
}
