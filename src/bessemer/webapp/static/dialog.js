// A window over the page, which has the whole width on a phone.
import { make } from "./page.js";

/** Show content in a dialog with a title; `closed` is called when it closes, by Esc or its button. Returns what closes it. */
export function showDialog(name, title, content, closed = () => {}) {
  const dialog = make("dialog", { class: `wide ${name}`, "aria-labelledby": `${name}-title` },
    make("div", { class: "row head" }, make("h2", { id: `${name}-title` }, ...[title].flat()), make("span", { class: "space" }), make("button", { class: "quiet", type: "button", "aria-label": "Close", onclick: () => dialog.close() }, "×")), content);
  dialog.addEventListener("close", () => { closed(); dialog.remove(); });
  document.body.append(dialog);
  dialog.showModal();
  return () => dialog.close();
}
