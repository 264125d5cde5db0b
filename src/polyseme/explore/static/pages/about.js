import { h } from "../dom.js";

export async function render(main, ctx) {
  main.append(h("h1", {}, ctx.run.title));
}
