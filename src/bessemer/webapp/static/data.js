// Data: a run's documents, searched where they lie, and the way of one of them.
import { byId, json, make, savePage, say, table, visible } from "./page.js";

const form = byId("ask"), state = byId("state"), list = byId("documents"), more = byId("more");
const place = new URLSearchParams(location.search);
const path = (...parts) => ["inspect/documents", ...parts.map(encodeURIComponent)].join("/");
const count = (number) => number.toLocaleString("en");
const value = (name) => form.elements[name].value;
let next = 0, asked = 0;

function options(name, entries, first) {
  const before = place.get(name) ?? value(name);
  form.elements[name].replaceChildren(...(first === undefined ? [] : [make("option", { value: "" }, first)]), ...entries.map(([key, label]) => make("option", { value: key }, label ?? key)));
  if (entries.some(([key]) => String(key) === before)) form.elements[name].value = before;
}

const failed = (error) => state.replaceChildren(make("span", { class: "failure" }, error.message));

/** Whether nothing newer has been asked for since: an answer that comes late is not shown. */
const isNewest = (mine) => mine === asked;

async function openRun() {
  const mine = ++asked;
  if (!value("run")) { state.textContent = "No run has documents here yet."; return; }
  const { folders } = await json(path(value("run")));
  if (!isNewest(mine)) return;
  const sides = folders.flatMap(({ stage, ...found }) => Object.entries(found).map(([side, documents]) => [`${stage}/${side}`, `${stage}: ${side === "documents" ? "kept" : "dropped"} (${count(documents)})`]));
  options("folder", sides);
  const stage = place.get("stage");
  if (stage && !place.has("folder") && sides.some(([key]) => key === `${stage}/documents`)) form.elements.folder.value = `${stage}/documents`;
  if (!sides.length) { state.textContent = "This run has no documents."; return; }
  await openFolder();
}

async function openFolder() {
  const mine = ++asked;
  const [stage, side] = value("folder").split("/");
  const found = await json(path(value("run"), stage, side, "facets"));
  if (!isNewest(mine)) return;
  options("source", found.sources.map(([name, number]) => [name, `${name} (${count(number)})`]), found.is_whole ? "any" : "any (not all were counted)");
  options("rule", found.rules.map(([name, number]) => [name, `${name} (${count(number)})`]), "any reason");
  options("column", found.scores.map((name) => [name, name.replaceAll("_", " ")]), "any");
  byId("rules").hidden = !found.rules.length;
  byId("duplicates").hidden = side !== "rejected";
  await search();
}

function question(start) {
  const [stage, side] = value("folder").split("/");
  const wanted = { text: value("text"), source: value("source"), rule: side === "rejected" ? value("rule") : "", column: value("column"), low: value("low"), high: value("high"), start };
  if (value("order") && value("column")) Object.assign(wanted, { order: value("column"), descending: value("order") === "down" });
  const query = new URLSearchParams(Object.entries(wanted).filter(([, one]) => one !== "" && one !== 0).map(([name, one]) => [name, String(one)]));
  return `${path(value("run"), stage, side)}?${query}`;
}

function setPlace(extra = {}) {
  const wanted = Object.fromEntries([...form.elements].filter((field) => field.name && field.value).map((field) => [field.name, field.value]));
  history.replaceState(null, "", `?${new URLSearchParams({ ...wanted, ...extra })}`);
}

async function search(start = 0) {
  const mine = ++asked;
  if (!start) { list.replaceChildren(); byId("document").hidden = true; }
  state.textContent = "Reading …";
  try {
    const found = await json(question(start));
    if (mine !== asked) return;
    list.append(...found.rows.map(shown));
    next = found.next;
    more.hidden = next === null;
    const looked = found.looked_at < found.documents && (next !== null || (value("order") && value("column"))) ? `; ${count(found.looked_at)} of ${count(found.documents)} looked at` : "";
    state.textContent = `${count(list.childElementCount)} documents${next === null ? "" : " so far"}${looked}`;
    setPlace();
    say(state.textContent);
  } catch (error) {
    failed(error);
  }
}

function shown(row) {
  const score = value("column");
  const facts = [row.source, `${count(row.characters)} characters`, score && row[score] !== null && row[score] !== undefined ? `${score.replaceAll("_", " ")} ${short(row[score])}` : "", row.split].filter(Boolean).join(" · ");
  return make("li", {},
    make("button", { class: "open", type: "button", onclick: () => openDocument(row.id) },
      !row.reason ? null : make("strong", { class: "failure" }, row.reason), make("span", { class: "answered" }, ...marked((row.text_start ? "… " : "") + row.text.replace(/\s+/g, " "), value("text"))), make("span", { class: "soft" }, facts)));
}

function marked(text, searched) {
  const at = searched ? text.toLowerCase().indexOf(searched.toLowerCase()) : -1;
  return at < 0 ? [text] : [text.slice(0, at), make("mark", {}, text.slice(at, at + searched.length)), text.slice(at + searched.length)];
}

const short = (number) => typeof number === "number" ? (Number.isInteger(number) ? count(number) : Number(number.toPrecision(4)).toString()) : String(number);

async function openDuplicates() {
  const mine = ++asked;
  const [stage, side] = value("folder").split("/");
  state.textContent = "Reading …";
  byId("document").hidden = true;
  try {
    const { groups } = await json(path(value("run"), stage, side, "duplicates"));
    if (!isNewest(mine)) return;
    state.textContent = groups.length ? `${groups.length} groups, the largest first` : "No document was dropped here as a duplicate.";
    more.hidden = true;
    const link = (id, text) => make("button", { class: "quiet", type: "button", onclick: () => openDocument(id) }, text ?? id.slice(0, 12));
    list.replaceChildren(...groups.map((group) => make("li", { class: "group" },
      make("p", {}, "stays: ", link(group.survivor), make("span", { class: "soft" }, ` for ${count(group.members)} ${group.members === 1 ? "other" : "others"}`)),
      make("p", { class: "soft" }, ...group.some.flatMap((one) => [link(one.id), `${one.wording}${one.similarity === null ? "" : ` ${one.similarity}`} · `])))));
  } catch (error) {
    failed(error);
  }
}

async function openDocument(id) {
  const mine = ++asked;
  const box = byId("document");
  state.textContent = "Asking every filter …";
  try {
    const found = await json(path(value("run"), id));
    if (!isNewest(mine)) return;
    state.textContent = "";
    setPlace({ id });
    box.hidden = false;
    box.replaceChildren(
      make("div", { class: "row" }, make("h2", { id: "document-title" }, "One document"), make("span", { class: "space" }), make("button", { class: "quiet", type: "button", "aria-label": "Close", onclick: () => { box.hidden = true; setPlace(); } }, "×")),
      make("p", { class: "soft" }, [found.source, found.language, found.license, found.split, `${count(found.characters)} characters`, found.id].filter(Boolean).join(" · ")),
      ...(found.url ? [make("p", { class: "soft" }, found.url)] : []),
      way(found), ...(found.explanation ? explained(found.explanation) : [make("p", { class: "failure" }, found.problem ?? "")]),
      make("h3", {}, "The text"), make("pre", { class: "whole", tabindex: "0" }, found.text),
      make("h3", {}, `In tokens${found.tokens.length ? `: ${count(found.tokens.length)}` : ""}`),
      make("p", { class: "tokens" }, ...found.tokens.slice(0, 4000).map((piece, number) => make("span", { class: `t${number % 5}` }, piece))));
    box.scrollIntoView({ block: "start" });
    say("the document is shown");
  } catch (error) {
    failed(error);
  }
}

function way(found) {
  return make("div", {}, make("h3", {}, "Its way"), table("Its way", ["Stage", "Text", "", ""], found.history.map((one) => make("tr", {},
    make("td", {}, one.stage), make("td", { class: "number" }, `${count(one.bytes)} bytes`),
    make("td", {}, make("span", { class: `status ${one.side === "documents" ? "done" : "failed"}` }, one.side === "documents" ? "kept" : "dropped")),
    make("td", {}, one.reason ?? "")))));
}

function explained(explanation) {
  const changed = explanation.edits.filter((edit) => edit.changes.length);
  const verdict = explanation.is_kept === null ? "" : explanation.is_kept ? "The run's recipe keeps it." : `The run's recipe drops it: ${Object.values(explanation.reasons).flat().join("; ")}`;
  const parts = [make("h3", {}, "What the filters say"), verdict && make("p", { class: explanation.is_kept ? "" : "failure" }, verdict)];
  for (const edit of changed) {
    parts.push(make("h4", {}, `Edit ${edit.name}: ${count(edit.changes.length)} ${edit.changes.length === 1 ? "change" : "changes"}`),
      ...edit.changes.slice(0, 12).map((change) => make("p", { class: "edits" }, change.left, make("del", {}, visibleSpan(change.before)), make("ins", {}, visibleSpan(change.after)), change.right)));
  }
  const limit = ([low, high]) => [low === null ? "" : `≥ ${short(low)}`, high === null ? "" : `≤ ${short(high)}`].filter(Boolean).join(" ");
  const rows = explanation.scores.map((score) => make("tr", { class: score.passes === false ? "failure" : undefined },
    make("td", {}, score.column.replaceAll("_", " ")), make("td", { class: "number" }, score.value === null ? "–" : short(score.value)),
    make("td", {}, limit(score.limit)), make("td", {}, score.preset), make("td", { class: "soft" }, score.description)));
  if (rows.length) parts.push(table("Scores", ["Score", "Value", "Kept", "Preset", "Says"], rows));
  return parts.filter(Boolean);
}

const visibleSpan = (text) => text.length > 160 ? `${text.slice(0, 80)} … ${text.slice(-80)}` : text && visible(text);

form.addEventListener("submit", (event) => { event.preventDefault(); search(); });
form.elements.run.addEventListener("change", () => { for (const name of ["folder", "stage", "source", "rule", "column"]) place.delete(name); openRun().catch(failed); });
form.elements.folder.addEventListener("change", () => { for (const name of ["source", "rule", "column"]) place.delete(name); openFolder().catch(failed); });
for (const name of ["source", "rule", "order"]) form.elements[name].addEventListener("change", () => search());
more.addEventListener("click", () => search(next));
byId("duplicates").addEventListener("click", openDuplicates);
byId("export-page").addEventListener("click", () => savePage(byId("view"), `Data of ${value("run")}`));

try {
  for (const name of ["text", "low", "high", "order"]) if (place.has(name)) form.elements[name].value = place.get(name);
  const { runs } = await json("inspect/runs");
  runs.sort((one, two) => two.changed - one.changed);
  options("run", runs.map((run) => [run.name]));
  const id = place.get("id");
  await openRun();
  if (id) await openDocument(id);
} catch (error) {
  failed(error);
}
