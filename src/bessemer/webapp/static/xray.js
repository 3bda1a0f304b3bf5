// The X-ray: a sentence of the user's, and the model without one of its heads.
import { byId, drawn, events, json, make, request, savePage, say } from "./page.js";

const form = byId("ask"), state = byId("state"), silence = byId("silence");
const number = (value) => (value === "" ? undefined : Number(value));
const list = (value) => value.split(",").map((part) => part.trim()).filter(Boolean);

function asked() {
  const { text, layer, head, query, key, neighbours } = form.elements;
  return { text: text.value, layer: number(layer.value), head: number(head.value), query: query.value || "-1", key: key.value || undefined, neighbours: list(neighbours.value) };
}

/** Draw the sections of an X-ray; those that are there already stay where they did not change. */
function drawSections(found) {
  byId("figures").replaceChildren(...found.figures.map(({ name, value }) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  byId("figures").hidden = false;
  const sections = byId("sections"), old = new Map([...sections.children].map((section) => [section.id, section]));
  sections.replaceChildren(...found.sections.map(({ name, title, html }) => {
    if (old.get(name)?.dataset.html === html) return old.get(name);
    const section = make("section", { id: name, "aria-labelledby": `${name}-title` }, make("h2", { id: `${name}-title` }, title));
    section.dataset.html = html;
    section.append(drawn(html));
    return section;
  }));
  byId("without").hidden = false;
  const head = found.hurts_most ?? { layer: 0, head: 0 };
  silence.elements.layer.max = String(found.layers - 1);
  silence.elements.head.max = String(found.heads - 1);
  silence.elements.layer.value = String(head.layer);
  silence.elements.head.value = String(head.head);
}

let looking = null;
async function look() {
  const body = asked(), stop = new AbortController(), button = form.querySelector("button");
  looking = stop;
  const bar = make("progress", { max: "1", "aria-label": "Progress" }), what = make("span", {}, "Reading …");
  state.replaceChildren(bar, " ", what, " ", make("button", { class: "quiet", type: "button", onclick: () => stop.abort() }, "Cancel"));
  button.disabled = true;
  byId("sections").replaceChildren();
  byId("answers").replaceChildren();
  try {
    for await (const event of events(await request("inspect/xray", { body: { ...body, stream: true }, signal: stop.signal }))) {
      if (event.error) throw new Error(event.error.message);
      if (event.sections) drawSections(event);
      else { bar.value = event.progress; what.textContent = `${event.what} …`; }
    }
    state.textContent = "";
    const place = new URLSearchParams(Object.entries(body).filter(([, value]) => value !== undefined && value.length !== 0).map(([name, value]) => [name, String(value)]));
    history.replaceState(null, "", `?${place}`);
    say("the sentence is drawn");
  } catch (error) {
    state.replaceChildren(error.name === "AbortError" ? "Cancelled." : make("span", { class: "failure" }, error.message));
  }
  if (looking === stop) button.disabled = false;
}

async function goOnWithout() {
  const { layer, head } = silence.elements, text = form.elements.text.value;
  byId("answers").replaceChildren(make("p", { class: "soft" }, "Reading …"));
  try {
    const { whole, without } = await json("inspect/without", { body: { text, layer: Number(layer.value), head: Number(head.value) } });
    const column = (title, answer) => make("div", { class: "column" }, make("h3", {}, title), make("p", { class: "answered" }, make("span", { class: "prompt" }, text), answer));
    byId("answers").replaceChildren(column("As it is", whole), column(`Without head ${head.value} of layer ${layer.value}`, without));
  } catch (error) {
    byId("answers").replaceChildren(make("p", { class: "failure" }, error.message));
  }
}

form.addEventListener("submit", (event) => { event.preventDefault(); look(); });
addEventListener("keydown", (event) => { if (event.key === "Escape") looking?.abort(); });
silence.addEventListener("submit", (event) => { event.preventDefault(); goOnWithout(); });
byId("export-page").addEventListener("click", () => savePage(document.querySelector("main"), `X-ray of ${form.elements.text.value}`));
const place = new URLSearchParams(location.search);
for (const [name, value] of place) if (form.elements[name]) form.elements[name].value = value;
if (place.has("text")) look();
