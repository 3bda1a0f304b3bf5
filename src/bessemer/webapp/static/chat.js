// The chat: conversations that are kept in the browser, branches, two answers side by side, and what is said of an answer.
import { byId, download, events, given, json, make, pause, percent, Refused, request, savePage, say, whole } from "./page.js";
import { MarkdownView } from "./markdown.js";
import * as store from "./store.js";
import { closeToken, openTokens } from "./token.js";
import * as documents from "./documents.js";

const log = byId("log"), scroll = byId("scroll"), prompt = byId("prompt"), send = byId("send"), settings = byId("settings");
let models = [], conversations = [], current = store.newConversation();
/** Answers that are being made: a node's id to what stops it. */
const running = new Map();
/** Elements and views of the messages that are shown, by their node's id. */
const shown = new Map();
/** The message whose answers stand side by side, and these. */
let pair = null;
/** Whether a question is about to be sent. */
let asking = false;

// --- settings -------------------------------------------------------------------------------------------------------

const sides = { first: settings.querySelector("[data-side=first]"), second: settings.querySelector("[data-side=second]") };
const field = (side, name) => sides[side].querySelector(`[name=${name}]`);

/** What a request says of the sampling, of one side. */
function sampling(side) {
  const number = (name) => (field(side, name).value === "" ? undefined : Number(field(side, name).value));
  const options = { temperature: number("temperature"), top_p: number("top_p"), top_k: number("top_k"), max_tokens: number("max_tokens"), seed: number("seed") };
  if (field(side, "stop").value) options.stop = [field(side, "stop").value];
  if (!options.top_k) delete options.top_k;
  return { model: field(side, "model").value || models[0]?.id, ...options };
}

const SETTINGS = "bessemer-settings";
function saveSettings() {
  const values = Object.fromEntries(Object.keys(sides).map((side) => [side, Object.fromEntries([...sides[side].querySelectorAll("input, select")].map((input) => [input.name, input.value]))]));
  localStorage.setItem(SETTINGS, JSON.stringify(values));
}
function loadSettings() {
  let values = {};
  try { values = JSON.parse(localStorage.getItem(SETTINGS)) ?? {}; } catch { /* from another version */ }
  for (const side of Object.keys(sides)) {
    for (const input of sides[side].querySelectorAll("input, select")) {
      const value = values[side]?.[input.name];
      if (typeof value === "string" && (input.tagName !== "SELECT" || [...input.options].some((option) => option.value === value))) input.value = value;
      const output = input.closest("label").querySelector("output");
      if (!output) continue;
      const tell = () => (output.textContent = Number(input.value).toFixed(2));
      input.oninput = tell;
      tell();
    }
  }
}

async function loadModels() {
  try {
    models = (await json("v1/models")).data;
  } catch (error) {
    log.replaceChildren(make("p", { class: "failure" }, error.message));
    return;
  }
  for (const side of Object.values(sides)) {
    side.querySelector("[name=model]").replaceChildren(...models.map((model) => make("option", { value: model.id }, model.id)));
  }
  loadSettings();
  updateSend();
}

// --- conversations ----------------------------------------------------------------------------------------------------

const titleOf = (conversation) => conversation.title || Object.values(conversation.nodes).find((node) => node.role === "user")?.content.slice(0, 80) || "New conversation";

async function save(conversation = current) {
  if (!Object.keys(conversation.nodes).length && !conversation.system && !conversation.documents?.files.length) return;
  if (!conversations.includes(conversation)) conversations.push(conversation);
  try {
    if (await store.put(conversation)) showNews(conversation);
  } catch (error) {
    say(`this browser keeps no conversations: ${error.message}`);
  }
}

/** Draw what another tab has said in a conversation, unless something is being done here. */
function showNews(conversation) {
  if (!byId("conversations").querySelector("input")) drawConversations();
  if (conversation !== current || running.size || asking || pair || !byId("side").hidden || log.querySelector(".editing")) return;
  byId("system").value = current.system;
  drawDocuments();
  if (current.leaf) store.showBranch(current, current.leaf);
  drawLog();
}

async function takeOthers(id) {
  const kept = await store.get(id), mine = conversations.find((one) => one.id === id);
  if (kept && mine) { if (store.takeOver(mine, kept)) showNews(mine); return; }
  if (kept) conversations.push(kept);
  else conversations = conversations.filter((one) => one.id !== id || one === current);
  showNews(kept);
}

function drawConversations() {
  const wanted = byId("search").value.trim().toLowerCase();
  const matches = (conversation) => !wanted || titleOf(conversation).toLowerCase().includes(wanted) || Object.values(conversation.nodes).some((node) => node.content.toLowerCase().includes(wanted));
  const found = conversations.filter(matches).sort((one, two) => two.updated - one.updated);
  byId("conversations").replaceChildren(...found.map((conversation) => make("li", { class: conversation === current ? "current" : undefined, data: { id: conversation.id } },
    make("button", { class: "open", type: "button", "aria-current": conversation === current ? "true" : undefined, onclick: () => open(conversation) }, titleOf(conversation)),
    make("button", { class: "quiet", type: "button", "aria-label": `Rename ${titleOf(conversation)}`, title: "Rename", onclick: () => rename(conversation) }, "✎"),
    make("button", { class: "quiet", type: "button", "aria-label": `Delete ${titleOf(conversation)}`, title: "Delete", onclick: () => drop(conversation) }, "×"),
  )));
  if (!found.length) byId("conversations").append(make("li", { class: "soft" }, wanted ? "Nothing found." : "Nothing said yet."));
}

function rename(conversation) {
  const place = [...byId("conversations").children].find((item) => item.dataset.id === conversation.id);
  const input = make("input", { "aria-label": "Name of the conversation", value: titleOf(conversation) });
  const done = () => { conversation.title = input.value.trim(); store.touch(conversation); save(conversation); drawConversations(); };
  input.addEventListener("keydown", (event) => { if (event.key === "Enter") done(); if (event.key === "Escape") drawConversations(); });
  input.addEventListener("blur", done, { once: true });
  place?.replaceChildren(input);
  input.focus();
  input.select();
}

async function drop(conversation) {
  if (!confirm(`Delete “${titleOf(conversation)}”?`)) return;
  conversations = conversations.filter((other) => other !== conversation);
  await store.remove(conversation.id);
  documents.forget(conversation);
  if (conversation === current) open(store.newConversation());
  else drawConversations();
}

function open(conversation) {
  for (const stop of running.values()) stop.abort();
  current = conversation;
  pair = null;
  byId("system").value = current.system;
  closeSides();
  drawDocuments();
  drawLog();
  drawConversations();
  toBottom();
  history.replaceState(null, "", Object.keys(current.nodes).length ? `#c=${current.id}` : "#");
  if (matchMedia("(max-width: 50rem)").matches) toggleList(false);
  prompt.focus();
}

function fromAddress() {
  const id = new URLSearchParams(location.hash.slice(1)).get("c");
  return conversations.find((conversation) => conversation.id === id) ?? store.newConversation();
}

// --- messages ---------------------------------------------------------------------------------------------------------

function drawLog() {
  shown.clear();
  const path = store.pathTo(current, current.leaf);
  if (!path.length) { log.replaceChildren(welcome()); updateSend(); return; }
  const parts = [];
  for (const node of path) {
    if (pair && node.parent === pair.parent) { parts.push(drawPair()); break; }
    parts.push(drawMessage(node));
  }
  log.replaceChildren(...parts);
  updateSend();
}

function welcome() {
  const offered = given.suggestions.map((text) => make("button", { type: "button", onclick: () => ask(text) }, text));
  return make("div", { id: "welcome" }, make("h1", {}, "A chat window"),
    make("p", {}, "Ask something. Answers come from the model that this server holds; conversations stay in this browser."),
    make("div", { id: "suggestions" }, ...offered));
}

function drawMessage(node) {
  const text = make("div", { class: "text" }), below = make("div", { class: "below" });
  const article = make("article", { class: node.role, data: { node: node.id } });
  const entry = { node, article, text, below, view: null, thinking: null };
  shown.set(node.id, entry);
  if (node.role === "user") text.textContent = node.content;
  else {
    if (node.thinking) growThinking(entry, node.thinking);
    entry.view = new MarkdownView(text, node.content, citer(node));
    if (running.has(node.id)) article.classList.add("working");
  }
  article.append(text, below);
  drawBelow(entry);
  return article;
}

/** What draws the citations of an answer from sources; null for another answer. */
function citer(node) { return node.sources ? (number) => documents.citation(node, number, closeToken) : null; }

function growThinking(entry, more) {
  if (!entry.thinking) {
    const body = make("div", { class: "thought" });
    entry.article.prepend(make("details", { class: "thinking" }, make("summary", {}, "Thinking"), body));
    entry.thinking = body.appendChild(document.createTextNode(""));
  }
  entry.thinking.appendData(more);
}

const action = (label, title, work, more = {}) => make("button", { class: "quiet", type: "button", title, onclick: work, ...more }, label);

function drawBelow(entry) {
  const { node, below } = entry;
  const others = store.siblings(current, node), place = others.indexOf(node);
  const parts = [];
  if (others.length > 1) {
    const go = (step) => () => { store.showBranch(current, others[place + step].id); pair = null; drawLog(); save(); };
    parts.push(action("‹", "Earlier branch", go(-1), { disabled: place === 0, "aria-label": "Earlier branch" }), make("span", { class: "place" }, `${place + 1} / ${others.length}`),
      action("›", "Later branch", go(1), { disabled: place === others.length - 1, "aria-label": "Later branch" }));
  }
  if (running.has(node.id)) { below.replaceChildren(...parts); return; }
  if (node.role === "user") parts.push(action("Edit", "Ask something else here; what was said stays as a branch", () => edit(entry, "Ask", (said) => ask(said, node.parent))));
  else {
    parts.push(
      action("Copy", "Copy the answer", async (event) => { await navigator.clipboard.writeText(node.content); event.target.textContent = "Copied"; setTimeout(() => (event.target.textContent = "Copy"), 1200); }),
      action("Again", "Another answer; this one stays as a branch", () => answerTo(node.parent)),
      action("Edit", "Write the answer as it should be", () => edit(entry, "Keep", (said) => correct(node, said))),
      action("Good", "A good answer", () => judge(entry, true), { "aria-pressed": node.thumb === true ? "true" : "false" }),
      action("Bad", "A bad answer", () => judge(entry, false), { "aria-pressed": node.thumb === false ? "true" : "false" }),
    );
    if (node.ids?.length) parts.push(action("Tokens", "The tokens of the answer, and what else could have come", () => { documents.closeSource(); openTokens(entry, goOn); }));
    parts.push(make("span", { class: "facts-of-answer" }, node.stats ?? ""));
  }
  below.replaceChildren(...parts);
  entry.sources?.remove();
  entry.sources = node.role === "assistant" ? documents.citedSources(node, closeToken) : null;
  if (entry.sources) below.before(entry.sources);
  if (node.failure) below.append(make("span", { class: "failure" }, node.failure));
}

function edit(entry, label, done) {
  const area = make("textarea", { "aria-label": "Text", rows: String(Math.min(20, entry.node.content.split("\n").length + 1)) });
  area.value = entry.node.content;
  const cancel = () => { entry.text.hidden = false; form.remove(); };
  const form = make("form", { class: "editing", onsubmit: (event) => { event.preventDefault(); if (area.value.trim()) done(area.value); } },
    area, make("div", { class: "row" }, make("button", { class: "strong" }, label), action("Cancel", "", cancel)));
  area.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.stopPropagation(); cancel(); } });
  entry.text.hidden = true;
  entry.text.after(form);
  area.focus();
}

/** The conversation before a message, as post-training reads it. */
function before(node) {
  const said = store.pathTo(current, node.parent).map(({ role, content }) => ({ role, content }));
  return [...(current.system ? [{ role: "system", content: current.system }] : []), ...said];
}

async function tell(row) {
  if (!given.feedback) return;
  try { await request("feedback", { body: row }); } catch (error) { say(error.message); }
}

function judge(entry, isGood) {
  const { node } = entry;
  node.thumb = node.thumb === isGood ? null : isGood;
  store.touch(node);
  drawBelow(entry);
  save();
  if (node.thumb !== null && node.content) tell({ prompt: before(node), completion: node.content, label: node.thumb });
}

function correct(node, text) {
  const better = store.addNode(current, node.parent, "assistant", text);
  better.stats = "edited";
  if (text !== node.content) tell({ prompt: before(node), chosen: text, rejected: node.content });
  pair = null;
  drawLog();
  save();
}

// --- two answers side by side -----------------------------------------------------------------------------------------

function drawPair() {
  const columns = pair.ids.map((id) => {
    const node = current.nodes[id];
    return make("div", { class: "column" }, make("h2", {}, node.side), drawMessage(node), action("Keep this one", "Go on with this answer", () => keep(id)));
  });
  return make("div", { class: "pair" }, ...columns);
}

/** Go on with one of two answers. isChosen: it was said to be the better one; who only types on has said nothing. */
function keep(id, isChosen = true) {
  const [chosen, rejected] = [id, ...pair.ids.filter((other) => other !== id)].map((each) => current.nodes[each]);
  for (const other of pair.ids) running.get(other)?.abort();
  if (isChosen && chosen.content && rejected.content && chosen.content !== rejected.content) tell({ prompt: before(chosen), chosen: chosen.content, rejected: rejected.content });
  pair = null;
  current.leaf = id;
  drawLog();
  save();
}

// --- asking -----------------------------------------------------------------------------------------------------------


async function ask(text, parent = current.leaf) {
  if (asking || !models.length || !text.trim()) return;
  if (running.size) { say("an answer is still being made"); return; }
  if (pair) keep(pair.ids[0], false);
  if (parent === current.leaf && current.nodes[parent]?.role === "user") parent = current.nodes[parent].parent;
  const node = store.addNode(current, parent, "user", text);
  current.updated = Date.now();
  prompt.value = "";
  grow();
  asking = true;
  await pause();
  asking = false;
  answerTo(node.id);
  await pause();
  drawConversations();
}

async function answerTo(parent) {
  if (running.size) return;
  const asked = byId("beside").checked ? ["first", "second"] : ["first"];
  const nodes = asked.map((side) => {
    const options = sampling(side), node = store.addNode(current, parent, "assistant");
    node.settings = options;
    node.side = side === "first" ? options.model : `${options.model} (beside)`;
    running.set(node.id, new AbortController());
    return node;
  });
  current.leaf = nodes[0].id;
  pair = nodes.length > 1 ? { parent, ids: nodes.map((node) => node.id) } : null;
  drawLog();
  await pause();
  toBottom();
  history.replaceState(null, "", `#c=${current.id}`);
  for (const node of nodes) makeAnswer(node, (signal, says) => chatEvents(node, signal, says));
}

/** Another answer that begins as one does, up to a token, and goes on from another one. */
function goOn(node, place, id, beginning) {
  if (running.size) return;
  const branch = store.addNode(current, node.parent, "assistant");
  branch.settings = node.settings;
  branch.promptIds = node.promptIds;
  branch.sources = node.sources;
  branch.ids = [...node.ids.slice(0, place), id];
  branch.content = beginning;
  running.set(branch.id, new AbortController());
  pair = null;
  drawLog();
  makeAnswer(branch, (signal) => completionEvents(branch, signal));
}

// A small model's context fills soon: the oldest turns are left out until the request fits, and the answer says so.
async function* chatEvents(node, signal, says) {
  const path = store.pathTo(current, node.parent).map((each) => ({ role: each.role, content: each.content }));
  const system = current.system ? [{ role: "system", content: current.system }] : [];
  const options = { ...node.settings }, stores = await documents.storesOf(current);
  if (stores.length) options.retrieval = { vector_store_ids: stores };
  let left = 0, response;
  for (;;) {
    const body = { ...options, stream: true, stream_options: { include_usage: true }, return_token_ids: true, messages: [...system, ...path.slice(left)] };
    try {
      response = await request("v1/chat/completions", { body, signal });
      // fewer tokens than were asked for: the oldest turns make room for them
      if (!response.headers.has("x-max-tokens") || path.length - left <= 2) break;
      response.body.cancel();
      left += 2;
    } catch (error) {
      if (!(error instanceof Refused) || error.code !== "context_length_exceeded") throw error;
      if (path.length - left > 2) left += 2;
      else if (options.max_tokens) delete options.max_tokens;
      else throw error;
    }
  }
  if (left) says(`the oldest ${left} messages no longer fit the model's context`);
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.prompt_token_ids) node.promptIds = event.prompt_token_ids;
    if (event.retrieval) { node.sources = event.retrieval.sources; node.annotations = []; }
    const choice = event.choices[0];
    for (const one of choice?.delta?.annotations ?? []) node.annotations.push(one);
    if (choice?.statements) node.statements = choice.statements;
    yield { text: choice?.delta?.content ?? "", thinking: choice?.delta?.reasoning ?? "", ids: choice?.token_ids ?? [], reason: choice?.finish_reason, usage: event.usage };
  }
}

async function* completionEvents(node, signal) {
  const { model, temperature, top_p, top_k, max_tokens, stop } = node.settings;
  const begun = [...node.promptIds, ...node.ids];
  const left = (models.find((one) => one.id === model)?.max_model_len ?? 0) - begun.length;
  if (left < 1) throw new Error("the model's context ends here");
  const body = { model, temperature, top_p, top_k, stop, max_tokens: Math.min(max_tokens ?? left, left), prompt: begun, stream: true, stream_options: { include_usage: true }, return_token_ids: true };
  for await (const event of events(await request("v1/completions", { body, signal }))) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    yield { text: choice?.text ?? "", thinking: "", ids: choice?.token_ids ?? [], reason: choice?.finish_reason, usage: event.usage };
  }
}

/** Take an answer as it comes, and draw it once a frame. */
async function makeAnswer(node, source) {
  const stop = running.get(node.id), started = performance.now(), conversation = current;
  let first = 0, last = 0, usage = null, reason = null, note = "";
  let text = "", thinking = "", frame = 0, saved = started;
  node.ids ??= [];
  const flush = () => {
    frame = 0;
    const entry = shown.get(node.id);
    if (entry) {
      const follows = atBottom();
      if (thinking) growThinking(entry, thinking);
      // the first event says whether it is an answer from sources
      entry.view.cite ??= citer(node);
      entry.view.append(text);
      if (follows) toBottom();
    }
    text = thinking = "";
    if (performance.now() - saved > 1500) { saved = performance.now(); store.touch(node); save(conversation); }
  };
  // a tab that is not shown has no frames
  const soon = () => { frame ||= document.hidden ? setTimeout(flush, 250) : requestAnimationFrame(flush); };
  updateSend();
  try {
    for await (const news of source(stop.signal, (said) => (note = said))) {
      usage = news.usage ?? usage;
      reason = news.reason ?? reason;
      for (const id of news.ids) node.ids.push(id);
      if (!news.text && !news.thinking) continue;
      first ||= performance.now();
      last = performance.now();
      node.content += news.text;
      if (news.thinking) node.thinking = (node.thinking ?? "") + news.thinking;
      text += news.text;
      thinking += news.thinking;
      soon();
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else node.failure = error.message;
  }
  flush();
  await pause();
  node.stats = [described(usage, last - first, first - started, reason, node.content, note), documents.support(node)].filter(Boolean).join(" · ");
  store.touch(node);
  conversation.updated = Date.now();
  // before it is shown as done, so that a page that is loaded again then has it
  await save(conversation);
  running.delete(node.id);
  const entry = shown.get(node.id);
  if (entry) { entry.article.classList.remove("working"); drawBelow(entry); }
  updateSend();
  await pause();
  drawConversations();
  say(node.failure ?? "the answer is there");
}

function described(usage, streaming, wait, reason, content, note) {
  const parts = [];
  if (usage) {
    const count = usage.completion_tokens, seconds = (streaming > 50 ? streaming : streaming + wait) / 1000;
    parts.push(`${count} token${count === 1 ? "" : "s"}`);
    if (content && seconds > 0) parts.push(`${whole(count / seconds)} tokens/s`);
    if (usage.prompt_tokens_details?.cached_tokens) parts.push(`${percent(usage.prompt_tokens_details.cached_tokens / usage.prompt_tokens)} of the prompt remembered`);
  }
  if (reason === "length") parts.push("cut at the most tokens");
  if (reason === "stopped") parts.push("stopped");
  if (reason === "stop" && !content) parts.push("the model said nothing");
  if (note) parts.push(note);
  return parts.join(" · ");
}

/** Code that runs for the first time is slow: it runs once on what nobody sees, while nothing else is to be done. */
(globalThis.requestIdleCallback ?? setTimeout)(() => {
  const unseen = new MarkdownView(make("div"), "");
  for (const part of ["A **b** `c`\n\n- d\n", "- *e*\n\n```x\ny\n", "```\n\n# f\n> g\n"]) unseen.append(part);
});

// --- the page ---------------------------------------------------------------------------------------------------------

function closeSides() { closeToken(); documents.closeSource(); }
function drawDocuments(conversation = current) { if (conversation === current) documents.drawAttached(current, documentsChanged(current)); }
/** What is done when files of a conversation are others: it is kept, and drawn where it is shown. */
function documentsChanged(conversation) {
  return () => {
    store.touch(conversation);
    save(conversation);
    drawDocuments(conversation);
    if (!byId("conversations").querySelector("input")) drawConversations();
  };
}
function attachFiles(files) { if (files.length) documents.attach(current, [...files], documentsChanged(current)); }

function atBottom() { return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80; }
function toBottom() { scroll.scrollTop = scroll.scrollHeight; }
function updateSend() {
  send.textContent = running.size ? "Stop" : "Send";
  send.disabled = !running.size && (!models.length || !prompt.value.trim());
}
function grow() { prompt.style.height = "auto"; prompt.style.height = `${prompt.scrollHeight}px`; updateSend(); }
function stopAll() { for (const stop of running.values()) stop.abort(); }
function toggleSettings(open = settings.hidden) { settings.hidden = !open; byId("show-settings").setAttribute("aria-expanded", String(open)); }
function toggleList(open = !document.body.classList.contains("with-list")) {
  document.body.classList.toggle("with-list", open);
  byId("show-list").setAttribute("aria-expanded", String(open));
}

byId("composer").addEventListener("submit", (event) => { event.preventDefault(); if (running.size) stopAll(); else ask(prompt.value); });
settings.addEventListener("submit", (event) => event.preventDefault());
settings.addEventListener("change", saveSettings);
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!running.size) ask(prompt.value); }
  if (event.key === "ArrowUp" && !prompt.value) {
    const asked = store.pathTo(current, current.leaf).findLast((node) => node.role === "user");
    const entry = asked && shown.get(asked.id);
    if (entry) { event.preventDefault(); edit(entry, "Ask", (said) => ask(said, asked.parent)); }
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (running.size) stopAll();
    else if (!settings.hidden) toggleSettings(false);
    else closeSides();
  }
  if (!event.altKey) return;
  const work = { KeyN: () => open(store.newConversation()), KeyS: () => toggleSettings(), KeyL: () => toggleList(), KeyF: () => { toggleList(true); byId("search").focus(); } }[event.code];
  if (work) { event.preventDefault(); work(); }
});
byId("new").addEventListener("click", () => open(store.newConversation()));
byId("search").addEventListener("input", drawConversations);
byId("show-settings").addEventListener("click", () => toggleSettings());
byId("show-list").addEventListener("click", () => toggleList());
byId("system").addEventListener("change", () => { current.system = byId("system").value.trim(); store.touch(current); save(); });
byId("beside").addEventListener("change", () => (sides.second.hidden = !byId("beside").checked));
byId("export-one").addEventListener("click", () => download("conversation.json", "application/json", JSON.stringify({ bessemer: "conversations", conversations: [current] }, null, 1)));
byId("export-all").addEventListener("click", () => download("conversations.json", "application/json", JSON.stringify({ bessemer: "conversations", conversations }, null, 1)));
byId("export-page").addEventListener("click", () => savePage(log, titleOf(current)));
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", async () => {
  const file = byId("import-file").files[0];
  byId("import-file").value = "";
  if (!file) return;
  let taken = [];
  try { taken = (JSON.parse(await file.text()).conversations ?? []).map(store.checked).filter(Boolean); } catch { /* not JSON */ }
  if (!taken.length) { say("the file holds no conversations"); alert("The file holds no conversations."); return; }
  conversations = [...conversations.filter((one) => !taken.some((other) => other.id === one.id)), ...taken];
  for (const conversation of taken) await save(conversation);
  open(taken[0]);
});

byId("attach").addEventListener("click", () => byId("attach-files").click());
byId("attach-files").addEventListener("change", () => { attachFiles(byId("attach-files").files); byId("attach-files").value = ""; });
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop") attachFiles(event.dataTransfer.files);
  });
}

loadModels().then(documents.loadIndexes);
store.all().catch(() => []).then((kept) => { conversations = kept; open(fromAddress()); store.onOthers(takeOthers); });
addEventListener("hashchange", () => { const wanted = fromAddress(); if (wanted.id !== current.id && Object.keys(wanted.nodes).length) open(wanted); });
toggleList(matchMedia("(min-width: 64rem)").matches);
