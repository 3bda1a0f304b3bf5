// Documents: files that are dropped into a conversation, the sources of an answer, and a document opened at a passage.
import { byId, json, make, request, say } from "./page.js";

const side = byId("side"), list = byId("attached"), choice = byId("answer-from");
const wait = (milliseconds) => new Promise((go) => setTimeout(go, milliseconds));

// --- what answers are drawn from ------------------------------------------------------------------------------------

const CHOICE = "bessemer-answer-from";

/** Offer the server's own indexes; without any, nothing is offered. The first is chosen until another choice is made. */
export async function loadIndexes() {
  let stores = [];
  try { stores = (await json("v1/vector_stores?limit=100")).data.filter((store) => store.is_served); } catch { /* a server without documents */ }
  choice.replaceChildren(make("option", { value: "" }, "What the model knows"), ...stores.map((store) => make("option", { value: store.id }, store.name)));
  const kept = localStorage.getItem(CHOICE);
  choice.value = stores.some((store) => store.id === kept) || kept === "" ? kept : (stores[0]?.id ?? "");
  choice.closest("label").hidden = !stores.length;
}
choice.addEventListener("change", () => localStorage.setItem(CHOICE, choice.value));

/** The vector stores of an answer, once the conversation's files are read; none: an answer without retrieval. */
export async function storesOf(conversation) {
  await working;
  const files = conversation.documents?.files ?? [];
  const own = files.some((file) => file.status === "completed") ? [conversation.documents.store] : [];
  return [...own, ...(choice.value ? [choice.value] : [])];
}

// --- files of a conversation ----------------------------------------------------------------------------------------

/** Files are read one after the other. */
let working = Promise.resolve();

/** Add files to a conversation. changed: called whenever anything of them is another. */
export function attach(conversation, files, changed) {
  for (const file of files) {
    const entry = { id: null, name: file.name, status: "uploading", error: "" };
    conversation.documents ??= { store: null, files: [] };
    conversation.documents.files.push(entry);
    working = working.then(() => readIn(conversation, entry, file, changed));
  }
  changed();
}

async function readIn(conversation, entry, file, changed) {
  const documents = conversation.documents;
  try {
    const form = new FormData();
    form.append("file", file);
    form.append("purpose", "user_data");
    entry.id = (await json("v1/files", { body: form })).id;
    documents.store ??= (await json("v1/vector_stores", { body: { name: conversation.title || file.name } })).id;
    entry.status = "in_progress";
    changed();
    let state = await json(`v1/vector_stores/${documents.store}/files`, { body: { file_id: entry.id } });
    while (state.status === "in_progress") {
      await wait(150);
      state = await json(`v1/vector_stores/${documents.store}/files/${entry.id}`);
    }
    entry.status = state.status;
    entry.error = state.last_error?.message ?? "";
  } catch (error) {
    entry.status = "failed";
    entry.error = error.message;
  }
  say(entry.error || `${entry.name} is read`);
  changed();
}

async function take(conversation, entry, changed) {
  conversation.documents.files = conversation.documents.files.filter((other) => other !== entry);
  changed();
  try { if (entry.id) await request(`v1/files/${entry.id}`, { method: "DELETE" }); } catch (error) { say(error.message); }
}

/** Delete what the server keeps for a conversation. */
export async function forget(conversation) {
  const { store, files } = conversation.documents ?? { store: null, files: [] };
  const paths = [...(store ? [`v1/vector_stores/${store}`] : []), ...files.filter((file) => file.id).map((file) => `v1/files/${file.id}`)];
  for (const path of paths) try { await request(path, { method: "DELETE" }); } catch { /* gone already, with an earlier server */ }
}

const STATES = { uploading: "is sent", in_progress: "is read", completed: "", failed: "cannot be read" };

export function drawAttached(conversation, changed) {
  const files = conversation.documents?.files ?? [];
  list.hidden = !files.length;
  list.replaceChildren(...files.map((entry) => make("li", { class: entry.status, title: entry.error || undefined },
    make("span", { class: "name" }, entry.name),
    STATES[entry.status] ? make("span", { class: entry.status === "failed" ? "failure" : "soft" }, entry.error || STATES[entry.status]) : null,
    make("button", { class: "quiet", type: "button", "aria-label": `Remove ${entry.name}`, title: "Remove", onclick: () => take(conversation, entry, changed) }, "×"),
  )));
}

// --- citations ------------------------------------------------------------------------------------------------------

/** The element of `[number]` in an answer, or null where it names no source. closeOther: closes what else the side shows. */
export function citation(node, number, closeOther) {
  const source = node.sources?.[number - 1];
  if (!source) return null;
  return make("button", { class: "cite", type: "button", data: { number: String(number) }, title: placeOf(source), "aria-label": `Source ${number}: ${placeOf(source)}`,
    onclick: (event) => openSource(node, number, event.currentTarget, closeOther) }, String(number));
}

const placeOf = (source) => [source.filename, source.page ? `page ${source.page}` : "", source.headings].filter(Boolean).join(" › ");

/** The sources that an answer cites, as a list below it; null where it cites none. */
export function citedSources(node, closeOther) {
  const numbers = [...new Set((node.annotations ?? []).map((one) => one.number))].sort((one, two) => one - two);
  if (!node.sources?.length) return null;
  if (!numbers.length) return make("p", { class: "soft sources" }, "This answer cites none of its sources.");
  return make("ol", { class: "sources" }, ...numbers.map((number) => make("li", { value: String(number) },
    make("button", { type: "button", onclick: (event) => openSource(node, number, event.currentTarget, closeOther) }, placeOf(node.sources[number - 1])))));
}

/** What is said of an answer's sentences. */
export function support(node) {
  const said = (node.statements ?? []).filter((one) => one.support !== null);
  const borne = said.filter((one) => one.is_supported).length;
  return said.length && borne < said.length ? `${said.length - borne} of ${said.length} sentences not in the sources` : "";
}

// --- a document at a passage ----------------------------------------------------------------------------------------

/** Passages shown before and after the one that is meant, until all are asked for. */
const AROUND = 30;
let isOpen = false;

export function closeSource() {
  if (!isOpen) return;
  isOpen = false;
  side.hidden = true;
  side.setAttribute("aria-label", "This token");
  side.replaceChildren();
  document.body.classList.remove("with-side");
}

async function openSource(node, number, pressed, closeOther) {
  closeOther();
  const source = node.sources[number - 1];
  const others = [...(pressed.closest("article")?.querySelectorAll(`.cite[data-number="${number}"]`) ?? [])];
  const meant = (node.annotations ?? []).filter((one) => one.number === number);
  const annotation = meant[Math.max(0, others.indexOf(pressed))] ?? meant[0] ?? source;
  isOpen = true;
  side.hidden = false;
  side.setAttribute("aria-label", "Source");
  document.body.classList.add("with-side");
  const heading = make("h2", { tabindex: "-1" }, source.title || source.filename);
  const back = () => { closeSource(); pressed.focus(); };
  const body = make("div", { class: "document" }, make("p", { class: "soft" }, "Opening…"));
  side.replaceChildren(
    make("div", { class: "row" }, heading, make("span", { class: "space" }), make("button", { class: "quiet", type: "button", title: "Close (Esc)", onclick: back }, "Close")),
    make("p", { class: "soft" }, placeOf(source)), body);
  heading.focus();
  let parts;
  try {
    parts = (await json(`v1/vector_stores/${source.vector_store_id}/files/${source.file_id}/content`)).data;
  } catch (error) {
    parts = [source];
    side.append(make("p", { class: "soft" }, `Only the passage is here: ${error.message}.`));
  }
  if (!body.isConnected) return;
  const first = Math.max(0, parts.findIndex((part) => part.end > annotation.start));
  drawDocument(body, parts, source, annotation, Math.max(0, first - AROUND), first + AROUND);
  if (source.page) drawPage(body, source);
}

function drawDocument(body, parts, source, annotation, from, to) {
  const nodes = [];
  const whole = () => drawDocument(body, parts, source, annotation, 0, parts.length);
  if (from > 0 || to < parts.length) nodes.push(make("button", { class: "quiet", type: "button", onclick: whole }, "Show the whole document"));
  let above = "";
  for (const part of parts.slice(from, to)) {
    if (part.headings && part.headings !== above) nodes.push(make("h3", {}, part.headings));
    above = part.headings;
    const isMeant = part.start < source.end && part.end > source.start;
    nodes.push(make("p", { class: isMeant ? "meant" : undefined }, ...marked(part, annotation.start, annotation.end)));
  }
  body.querySelector("img")?.remove();
  body.replaceChildren(...nodes);
  (body.querySelector("mark") ?? body.querySelector(".meant"))?.scrollIntoView({ block: "center" });
}

/** A part of a document with the bytes from `start` to `end` of the document marked. */
function marked(part, start, end) {
  const bytes = new TextEncoder().encode(part.text), text = (from, to) => new TextDecoder().decode(bytes.slice(from, to));
  const from = Math.max(0, start - part.start), to = Math.min(bytes.length, end - part.start);
  if (from >= to) return [part.text];
  return [text(0, from), make("mark", {}, text(from, to)), text(to)];
}

/** The page of a PDF with the passage marked, where the server draws pages. */
async function drawPage(body, source) {
  const box = source.box ? `&box=${source.box.map((number) => number.toFixed(1)).join(",")}` : "";
  try {
    const picture = await (await request(`v1/vector_stores/${source.vector_store_id}/files/${source.file_id}/page?number=${source.page}${box}`)).blob();
    const reader = new FileReader();
    reader.onload = () => { if (body.isConnected) body.prepend(make("img", { class: "leaf", src: reader.result, alt: `Page ${source.page} of ${source.filename}, with the passage marked` })); };
    reader.readAsDataURL(picture);
  } catch { /* its text is shown */ }
}
