// Safety: the policy's table, a text put to the guard, its latest decisions, and red teams' findings.
import { byId, drawn, json, make, savePage, say } from "./page.js";

const form = byId("try"), state = byId("state"), choose = byId("choose");
const AGAIN = 5000;
const words = (name) => name.replaceAll("_", " ");
const head = (...names) => make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name))));
const cells = (...texts) => make("tr", {}, ...texts.map((text) => make("td", {}, text)));

/** The policy's line that led to a decision: its place, and what stands there. */
const lineOf = ({ place, line }) => place ? make("span", {}, make("code", {}, place), make("br"), make("code", { class: "soft" }, line)) : "";

function drawPolicy({ name, hash, surfaces, categories }, rails) {
  byId("policy-name").textContent = `${name}, ${hash.slice(0, 8)}; looked at with ${rails.join(", ")}`;
  byId("policy").replaceChildren(
    head("Category", "Meaning", ...surfaces),
    make("tbody", {}, ...categories.map((one) => make("tr", {}, make("th", { scope: "row" }, `${one.code} ${words(one.name)}`.trim()), make("td", {}, one.meaning), ...one.actions.map((action) => make("td", { class: action === "allow" ? "soft" : undefined }, words(action)))))));
}

function drawDecisions(decisions, texts) {
  byId("texts").textContent = texts ? "The latest decisions that were more than to allow." : "The latest decisions that were more than to allow, without the texts: the server keeps these with --audit-content.";
  byId("decisions").replaceChildren(
    head("When", "Where", "What was done", "By which rule", "The policy's line", ...(texts ? ["Text"] : ["Characters"])),
    make("tbody", {}, ...decisions.map((one) => cells(
      new Date(1000 * one.time).toLocaleTimeString(), one.surface, `${words(one.action)} · ${words(one.category)}`,
      `${one.rail}: ${one.rule}${one.reading === "plain" ? "" : `, read as ${one.reading}`}`, lineOf(one), texts ? one.text.slice(0, 400) : String(one.characters)))));
}

async function read(isFirst) {
  const found = await json("inspect/safety");
  if (found.policy === null) { state.textContent = "This server has no guard: --policy FILE starts it with one."; return false; }
  state.textContent = "";
  byId("guarded").hidden = false;
  if (isFirst) {
    drawPolicy(found.policy, found.rails);
    form.elements.surface.replaceChildren(...found.policy.surfaces.map((name) => make("option", { value: name }, name)));
  }
  drawDecisions(found.decisions, found.texts);
  return true;
}

async function ask() {
  const { text, surface } = form.elements, box = byId("decided");
  box.replaceChildren(make("p", { class: "soft" }, "Reading …"));
  try {
    const { decision, findings } = await json("inspect/safety/check", { body: { text: text.value, surface: surface.value } });
    box.replaceChildren(
      make("p", {}, make("strong", {}, words(decision.action)), ` · ${decision.reason}`), make("p", {}, lineOf(decision)),
      ...(findings.length ? [make("table", {}, head("Score", "Category", "Found by", "What is done"), make("tbody", {}, ...findings.map((one) => cells(one.score.toFixed(2), words(one.category), `${one.rail}: ${one.rule}${one.reading === "plain" ? "" : `, read as ${one.reading}`}`, words(one.action)))))] : []));
  } catch (error) {
    box.replaceChildren(make("p", { class: "failure" }, error.message));
  }
}

async function openRun() {
  const box = byId("findings");
  box.replaceChildren(make("p", { class: "soft" }, "Reading …"));
  try {
    box.replaceChildren(drawn((await json(`inspect/redteams/${encodeURIComponent(choose.elements.run.value)}`)).html));
  } catch (error) {
    box.replaceChildren(make("p", { class: "failure" }, error.message));
  }
}

async function readRuns() {
  const { runs } = await json("inspect/redteams");
  if (!runs.length) return;
  byId("redteams").hidden = false;
  choose.elements.run.replaceChildren(...runs.map((run) => make("option", { value: run.name }, `${run.name}${run.problem ? " (cannot be read)" : run.measurable ? "" : " (not measurable)"}`)));
  await openRun();
}

form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
choose.addEventListener("change", openRun);
byId("export-page").addEventListener("click", () => savePage(document.querySelector("main"), "Safety"));

try {
  if (await read(true)) {
    say("the policy is shown");
    // decisions come while others use the server
    setInterval(() => { if (document.visibilityState === "visible") read(false).catch(() => {}); }, AGAIN);
  }
} catch (error) {
  state.replaceChildren(make("span", { class: "failure" }, error.message));
}
readRuns().catch(() => { /* a server that shows no runs */ });
