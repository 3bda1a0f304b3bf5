// The chat: conversations that are kept in the browser, branches, two answers side by side, and what is said of an answer.
import { byId, download, given, make, pause, request, savePage, say, whole } from "./page.js";
import { chatEvents, completionEvents, described, watchOpening } from "./answers.js";
import { MarkdownView } from "./markdown.js";
import { drawComparisons, record } from "./comparisons.js";
import { contextOf, inWords, loadModels, models, sampling, settings } from "./settings.js";
import * as store from "./store.js";
import { closeToken, openTokens } from "./token.js";
import * as documents from "./documents.js";
import * as pictures from "./pictures.js";

const log = byId("log"), scroll = byId("scroll"), prompt = byId("prompt"), send = byId("send"), picker = byId("model-picker");
let conversations = [], current = store.newConversation();
/** Why there are no models; null: there are, or will be. */
let problem = null;
/** Answers that are being made: a node's id to what stops it, and to its conversation. */
const running = new Map();
const isRunning = (conversation = current) => [...running.values()].some((one) => one.conversation === conversation);
const start = (node, conversation = current) => running.set(node.id, { stop: new AbortController(), conversation });
/** Elements and views of the messages that are shown, by their node's id. */
const shown = new Map();
/** The message whose answers stand side by side, and these. */
let pair = null;
/** Whether a question is about to be sent. */
let asking = false;

async function begin() {
  try {
    await loadModels();
    problem = null;
    documents.loadIndexes();
  } catch (error) {
    problem = error.message;
  }
  if (!Object.keys(current.nodes).length) drawLog();
  updateSend();
}

// --- conversations ----------------------------------------------------------------------------------------------------

const titleOf = (conversation) => conversation.title || Object.values(conversation.nodes).find((node) => node.role === "user" && node.content)?.content.slice(0, 80) || (Object.keys(conversation.nodes).length ? "Pictures" : "New conversation");

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
  if (conversation !== current || isRunning() || asking || pair || !byId("side").hidden || log.querySelector(".editing")) return;
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
  stopAll(conversation);
  conversations = conversations.filter((other) => other !== conversation);
  await store.remove(conversation.id);
  documents.forget(conversation);
  if (conversation === current) open(store.newConversation());
  else drawConversations();
}

/** Show a conversation. Answers of others go on. isNew: whether the browser's way back leads to the one before. */
function open(conversation, isNew = true) {
  const address = Object.keys(conversation.nodes).length ? `#c=${conversation.id}` : "#";
  if (isNew && (location.hash || "#") !== address) history.pushState(null, "", address);
  current = conversation;
  pair = null;
  byId("system").value = current.system;
  closeSides();
  drawDocuments();
  drawLog();
  drawConversations();
  toBottom();
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
  byId("title").hidden = !path.length;
  byId("title").textContent = titleOf(current);
  if (!path.length) { log.replaceChildren(welcome()); updateSend(); return; }
  const parts = current.system ? [make("article", { class: "system" }, make("details", {}, make("summary", {}, "System message"), make("p", { class: "text" }, current.system)))] : [];
  for (const node of path) {
    if (pair && node.parent === pair.parent) { parts.push(drawPair()); break; }
    parts.push(drawMessage(node));
  }
  log.replaceChildren(...parts);
  updateSend();
}

function welcome() {
  const offered = given.suggestions.map((text) => make("button", { type: "button", onclick: () => ask(text) }, text));
  if (problem) {
    return make("div", { id: "welcome" }, make("h1", {}, "A chat window"), make("p", { class: "failure", role: "alert" }, problem),
      make("button", { class: "strong", type: "button", onclick: begin }, "Try again"));
  }
  return make("div", { id: "welcome" }, make("h1", {}, "A chat window"),
    make("p", {}, "Ask something. Answers come from the model that this server holds; conversations stay in this browser."),
    make("div", { id: "suggestions" }, ...offered));
}

function drawMessage(node) {
  const text = make("div", { class: "text" }), below = make("div", { class: "below" });
  const article = make("article", { class: node.role, data: { node: node.id } });
  const entry = { node, article, text, below, view: null, thinking: null, taken: node.content.length, thought: node.thinking?.length ?? 0 };
  shown.set(node.id, entry);
  if (node.role === "user") {
    text.textContent = node.content;
    if (node.images) article.append(pictures.pictures(node.images));
    text.hidden = !node.content;
  } else {
    if (node.thinking) growThinking(entry, node.thinking);
    entry.view = new MarkdownView(text, node.content, citer(node));
    if (running.has(node.id)) article.classList.add("working");
    else entry.view.finish();
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
  // the order of the branches is that of the settings: it would say which is which
  if (others.length > 1 && !isHidden(node)) {
    const go = (step) => () => { store.showBranch(current, others[place + step].id); pair = null; drawLog(); save(); };
    parts.push(action("‹", "Earlier branch", go(-1), { disabled: place === 0, "aria-label": "Earlier branch" }), make("span", { class: "place" }, `${place + 1} / ${others.length}`),
      action("›", "Later branch", go(1), { disabled: place === others.length - 1, "aria-label": "Later branch" }));
  }
  if (running.has(node.id)) { below.replaceChildren(...parts); return; }
  if (node.role === "user") parts.push(action("Edit", "Ask something else here; what was said stays as a branch", () => edit(entry, "Ask", (said, images) => ask(said, node.parent, images))));
  else {
    if (canContinue(node)) parts.push(action("Continue", "Go on where the answer was cut", () => proceed(node)));
    parts.push(
      action("Copy", "Copy the answer", async (event) => { await navigator.clipboard.writeText(node.content); event.target.textContent = "Copied"; setTimeout(() => (event.target.textContent = "Copy"), 1200); }),
      action("Again", "Another answer; this one stays as a branch", () => answerTo(node.parent)),
      action("Edit", "Write the answer as it should be", () => edit(entry, "Keep", (said) => correct(node, said))),
      action("Good", "A good answer", () => judge(entry, true), { "aria-pressed": node.thumb === true ? "true" : "false" }),
      action("Bad", "A bad answer", () => judge(entry, false), { "aria-pressed": node.thumb === false ? "true" : "false" }),
    );
    if (node.ids?.length) parts.push(action("Tokens", "The tokens of the answer by their surprise, and what else could have come", () => { documents.closeSource(); openTokens(entry, goOn, store.imagesBefore(current, node)); }));
    if (!isHidden(node)) parts.push(...[node.stats, node.settings && inWords(node.settings)].map((said) => make("span", { class: "facts-of-answer" }, said ?? "")));
  }
  below.replaceChildren(...parts);
  entry.sources?.remove();
  entry.sources = node.role === "assistant" ? documents.citedSources(node, closeToken) : null;
  if (entry.sources) below.before(entry.sources);
  if (node.failure) below.append(make("span", { class: "failure" }, node.failure));
}

/** Whether an answer was cut, and can go on behind its tokens: not within its thinking, and not in a form. */
const canContinue = (node) => ["length", "stopped"].includes(node.reason) && node.promptIds && node.content && node.ids?.length && !node.settings.response_format && !node.sources;
/** Whether it must not be said what made an answer, its speed included. */
const isHidden = (node) => Boolean(pair?.blind && pair.ids.includes(node.id));

function edit(entry, label, done) {
  const area = make("textarea", { "aria-label": "Text", rows: String(Math.min(20, entry.node.content.split("\n").length + 1)) });
  area.value = entry.node.content;
  // what was asked of has its pictures in the form, where they can be taken out
  let images = entry.node.images ?? [];
  const asked = entry.article.querySelector(":scope > .pictures"), place = make("div");
  const drawImages = () => place.replaceChildren(...(images.length ? [pictures.pictures(images, (others) => { images = others; drawImages(); })] : []));
  drawImages();
  const cancel = () => { entry.text.hidden = !entry.node.content; if (asked) asked.hidden = false; form.remove(); };
  const form = make("form", { class: "editing", onsubmit: (event) => { event.preventDefault(); if (area.value.trim() || images.length) done(area.value, images); } },
    place, area, make("div", { class: "row" }, make("button", { class: "strong" }, label), action("Cancel", "", cancel)));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
  });
  entry.text.hidden = true;
  if (asked) asked.hidden = true;
  entry.text.after(form);
  area.focus();
}

/** The conversation before a message, as post-training reads it. */
const before = (node) => store.messagesTo(current, node.parent);

/** What is told is kept in the order in which it was said. */
let telling = Promise.resolve();
function tell(row, path = "feedback", method = "POST") {
  if (!given.feedback) return;
  // preferences are learnt from text
  if (row?.prompt.some((message) => typeof message.content !== "string")) { say("what is said of an answer to pictures stays in this browser"); return; }
  telling = telling.then(() => request(path, { body: row, method })).catch((error) => say(error.message));
}

function judge(entry, isGood) {
  const { node } = entry;
  node.thumb = node.thumb === isGood ? null : isGood;
  store.touch(node);
  drawBelow(entry);
  save();
  if (!node.content) return;
  // the server keeps one label of an answer, the last
  if (node.thumb === null) tell(undefined, `feedback/${node.id}`, "DELETE");
  else tell({ prompt: before(node), completion: node.content, label: node.thumb, id: node.id });
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
  const columns = pair.ids.map((id, place) => {
    const node = current.nodes[id];
    return make("div", { class: "column" }, make("h2", {}, pair.blind ? `Answer ${"AB"[place]}` : node.side), drawMessage(node), pair.blind ? null : action("Keep this one", "Go on with this answer", () => keep(id)));
  });
  const drawn = make("div", { class: "pair" }, ...columns);
  if (pair.blind) drawn.append(make("div", { id: "verdicts", class: "row", role: "group", "aria-label": "Which answer is better" }));
  setTimeout(drawVerdicts);
  return drawn;
}

/** What can be said of two answers whose names are hidden, once both are there. */
function drawVerdicts() {
  const place = byId("verdicts");
  if (!place || !pair?.blind) return;
  if (pair.ids.some((id) => running.has(id))) { place.replaceChildren(make("span", { class: "soft" }, "Read both, then say which is better; their names come after that.")); return; }
  const [first, second] = pair.ids, follows = atBottom();
  place.replaceChildren(
    action("A is better", "The first answer is better", () => decide(first)), action("B is better", "The second answer is better", () => decide(second)),
    action("As good", "Neither is better", () => decide(null)), action("Skip", "Nothing is recorded", () => keep(first, false)));
  if (follows) toBottom();
}

/** Record which of two answers with hidden names is better, show the names, and go on with it. id: null for neither. */
function decide(id) {
  const [first, second] = pair.ids.map((each) => current.nodes[each]);
  record({ settings: [first.settings, second.settings].map(inWords), winner: id === null ? null : pair.ids.indexOf(id) });
  const names = pair.ids.map((each, place) => `${"AB"[place]}: ${inWords(current.nodes[each].settings)}`).join("\n");
  keep(id ?? first.id, id !== null);
  drawComparisons();
  say(names);
}

/** Go on with one of two answers. isChosen: it was said to be the better one; who only types on has said nothing. */
function keep(id, isChosen = true) {
  const [chosen, rejected] = [id, ...pair.ids.filter((other) => other !== id)].map((each) => current.nodes[each]);
  for (const other of pair.ids) running.get(other)?.stop.abort();
  if (isChosen && chosen.content && rejected.content && chosen.content !== rejected.content) tell({ prompt: before(chosen), chosen: chosen.content, rejected: rejected.content });
  pair = null;
  current.leaf = id;
  drawLog();
  save();
}

// --- asking -----------------------------------------------------------------------------------------------------------


/** Why a question with so many pictures cannot be sent; null: it can. */
const blindness = (count, parent = current.leaf) => pictures.blindness(sidesAsked().map((side) => byId("settings").querySelector(`[data-side=${side}] [name=model]`).value || models[0]?.id), count > 0, store.pathTo(current, parent).some((node) => node.images));
const sidesAsked = () => (byId("beside").checked ? ["first", "second"] : ["first"]);

async function ask(text, parent = current.leaf, images = null) {
  if (asking || !models.length || !(text.trim() || images?.length || (images === null && pictures.count()))) return;
  if (isRunning()) { say("an answer is still being made"); return; }
  const blind = blindness(images?.length ?? pictures.count(), parent);
  if (blind || (images === null && pictures.isReading())) { say(blind ?? "a picture is still being read"); return; }
  if (pair) keep(pair.ids[0], false);
  if (parent === current.leaf && current.nodes[parent]?.role === "user") parent = current.nodes[parent].parent;
  // a question whose pictures were refused is not sent again with the next one
  const refused = parent === current.leaf && current.nodes[parent]?.failure && !current.nodes[parent].content && current.nodes[current.nodes[parent].parent];
  if (refused?.images) parent = refused.parent;
  const node = store.addNode(current, parent, "user", text);
  const taken = images ?? pictures.take();
  if (taken.length) node.images = taken;
  current.updated = Date.now();
  prompt.value = "";
  grow();
  asking = true;
  await pause();
  asking = false;
  await answerTo(node.id);
  await pause();
  drawConversations();
}

async function answerTo(parent) {
  if (isRunning()) return;
  const asked = sidesAsked();
  let options;
  try { options = asked.map(sampling); } catch (error) { toggleSettings(true); say(error.message); alert(error.message); return; }
  const conversation = current;
  const nodes = asked.map((side, place) => {
    const node = store.addNode(conversation, parent, "assistant");
    node.settings = options[place];
    node.side = side === "first" ? node.settings.model : `${node.settings.model} (beside)`;
    start(node);
    return node;
  });
  const blind = nodes.length > 1 && byId("blind").checked;
  // who sees the sides must not know them by their order
  const shuffled = blind && Math.random() < 0.5 ? [...nodes].reverse() : nodes;
  conversation.leaf = shuffled[0].id;
  pair = nodes.length > 1 ? { parent, ids: shuffled.map((node) => node.id), blind } : null;
  drawLog();
  await pause();
  showQuestion(parent);
  if (location.hash !== `#c=${conversation.id}`) history.replaceState(null, "", `#c=${conversation.id}`);
  // kept from the beginning: another conversation may be read before anything of the answer is there
  save(conversation);
  for (const node of nodes) makeAnswer(node, (signal, says) => chatEvents(conversation, node, signal, says));
}

/** Another answer that begins as one does, up to a token, and goes on from another one. */
function goOn(node, place, id, beginning) {
  if (isRunning()) return;
  const branch = store.addNode(current, node.parent, "assistant");
  branch.settings = node.settings;
  branch.promptIds = node.promptIds;
  branch.promptTokens = node.promptTokens;
  branch.left = node.left;
  branch.sources = node.sources;
  branch.ids = [...node.ids.slice(0, place), id];
  if (node.top?.[place]) {
    const [, ids, logProbs] = node.top[place];
    branch.top = [...node.top.slice(0, place), ids.includes(id) ? [logProbs[ids.indexOf(id)], ids, logProbs] : null];
  }
  branch.content = beginning;
  proceed(branch);
}

/** Go on behind the tokens of an answer. */
function proceed(node) {
  if (isRunning()) return;
  start(node);
  delete node.failure;
  pair = null;
  drawLog();
  const conversation = current;
  // plain completions take no pictures: there the conversation goes on with the answer's text
  if (store.imagesBefore(conversation, node).length) makeAnswer(node, (signal, says) => chatEvents(conversation, node, signal, says, true));
  else makeAnswer(node, (signal) => completionEvents(node, signal));
}

/** Take an answer as it comes, and draw it once a frame. */
async function makeAnswer(node, source) {
  const { stop, conversation } = running.get(node.id), started = performance.now();
  let first = 0, last = 0, usage = null, reason = null, note = "";
  let frame = 0, saved = started;
  node.ids ??= [];
  const flush = () => {
    frame = 0;
    const entry = shown.get(node.id);
    if (entry) {
      const follows = isFollowing, thinking = node.thinking ?? "";
      entry.article.querySelector(".opening")?.remove();
      if (thinking.length > entry.thought) growThinking(entry, thinking.slice(entry.thought));
      // the first event says whether it is an answer from sources
      entry.view.cite ??= citer(node);
      entry.view.append(node.content.slice(entry.taken));
      entry.thought = thinking.length;
      entry.taken = node.content.length;
      if (follows) toBottom();
    }
    if (performance.now() - saved > 1500) { saved = performance.now(); store.touch(node); save(conversation); }
  };
  // a tab that is not shown has no frames
  const soon = () => { frame ||= document.hidden ? setTimeout(flush, 250) : requestAnimationFrame(flush); };
  updateSend();
  if (models.find((one) => one.id === node.settings.model)?.max_model_len === null) watchOpening(node.settings.model, (state) => drawOpening(node, state), () => first || !running.has(node.id));
  try {
    for await (const news of source(stop.signal, (said) => (note = said))) {
      usage = news.usage ?? usage;
      reason = news.reason ?? reason;
      if (!news.text && !news.thinking) continue;
      first ||= performance.now();
      last = performance.now();
      node.content += news.text;
      if (news.thinking) node.thinking = (node.thinking ?? "") + news.thinking;
      soon();
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else node.failure = error.message;
  }
  flush();
  shown.get(node.id)?.view.finish();
  await pause();
  node.reason = reason;
  // a picture is one of the prompt's ids, and many of its tokens
  if (usage) node.promptTokens ??= usage.prompt_tokens;
  node.stats = [described(usage, last - first, first - started, reason, node.content, note), documents.support(node)].filter(Boolean).join(" · ");
  store.touch(node);
  conversation.updated = Date.now();
  // before it is shown as done, so that a page that is loaded again then has it
  await save(conversation);
  running.delete(node.id);
  // a model that was opened for it says by now how long its context is
  if (models.find((one) => one.id === node.settings.model)?.max_model_len === null) contextOf(node.settings.model).then(drawContext, () => {});
  const entry = shown.get(node.id);
  if (entry) { entry.article.classList.remove("working"); drawBelow(entry); }
  if (pair?.ids.includes(node.id)) drawVerdicts();
  updateSend();
  await pause();
  drawConversations();
  say(node.failure ?? "the answer is there");
}

/** How far a model is that is being opened: as far as it was after this time when it was opened last. */
function drawOpening(node, { seconds, bytes, usual }) {
  const entry = shown.get(node.id);
  if (!entry) return;
  const size = bytes ? `, ${(bytes / 2 ** 30).toFixed(bytes < 2 ** 30 ? 2 : 1)} GiB` : "", share = usual ? Math.min(0.99, seconds / usual) : undefined;
  const line = entry.article.querySelector(".opening") ?? entry.text.appendChild(make("p", { class: "opening soft" }));
  line.replaceChildren(`Opening ${node.settings.model}${size}: ${Math.round(seconds)} s${usual ? ` of about ${Math.round(usual)} s` : ""} `, make("progress", { max: "1", value: share, "aria-label": "Opening the model" }));
}

/** Code that runs for the first time, and a font that is used for the first time, are slow: both run once on what nobody sees, part by
 *  part while nothing else is to be done. */
function warm(parts, view = new MarkdownView(make("div", { class: "text unseen-text", inert: true }))) {
  (globalThis.requestIdleCallback ?? setTimeout)(() => {
    view.append(parts[0]);
    scroll.append(view.node);
    view.node.getBoundingClientRect();
    view.node.remove();
    if (parts.length > 1) warm(parts.slice(1), view);
  });
}
warm(["A ", "**b** ", "*c* ", "`d`\n\n", "- e\n\n", "```python\ndef f(): return 1\n", "```\n\n", "# g\n> h\n"]);

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
function attachFiles(files) {
  const [images, others] = [[...files].filter(pictures.isPicture), [...files].filter((file) => !pictures.isPicture(file))];
  if (images.length) pictures.add(images, picker.value, updateSend);
  if (others.length) documents.attach(current, others, documentsChanged(current));
}

function atBottom() { return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80; }
function toBottom() { scroll.scrollTop = scroll.scrollHeight; drawEnd(); }
/** Whether the end was seen when it was looked at last, after each scroll: to ask at each frame would lay the page out twice. */
let isFollowing = true;
function drawEnd() { byId("to-end").hidden = isFollowing = atBottom(); }
/** Scroll so that a question can be read: its end at the bottom, or its beginning where it is longer than the window. What is above has
 *  no exact height until it was drawn, so once more when it is. */
function showQuestion(id) {
  const show = () => {
    toBottom();
    const article = shown.get(id)?.article;
    if (article && article.getBoundingClientRect().top < scroll.getBoundingClientRect().top) article.scrollIntoView({ block: "start" });
    drawEnd();
  };
  show();
  requestAnimationFrame(show);
}
function updateSend() {
  send.textContent = isRunning() ? "Stop" : "Send";
  const blind = models.length ? blindness(pictures.count()) : null;
  pictures.warn(blind);
  send.disabled = !isRunning() && (!models.length || pictures.isReading() || Boolean(blind) || !(prompt.value.trim() || pictures.count()));
  drawContext();
}
/** How much of the model's context the last answer and what came before it take. */
function drawContext() {
  const last = store.pathTo(current, current.leaf).findLast((node) => node.promptIds), context = models.find((one) => one.id === last?.settings.model)?.max_model_len;
  const meter = byId("context"), used = last ? (last.promptTokens ?? last.promptIds.length) + last.ids.length : 0;
  meter.hidden = !context;
  if (context) meter.replaceChildren(make("meter", { min: "0", max: String(context), high: String(0.85 * context), value: String(used), "aria-label": "Context used" }), ` ${whole(used)} of ${whole(context)} tokens`);
}
function grow() { prompt.style.height = "auto"; prompt.style.height = `${prompt.scrollHeight}px`; updateSend(); }
function stopAll(conversation = current) { for (const one of running.values()) if (one.conversation === conversation) one.stop.abort(); }
function toggleSettings(open = settings.hidden) {
  // what was typed last is told before its field is hidden: Firefox tells nothing of a hidden one
  if (!open && settings.contains(document.activeElement)) document.activeElement.blur();
  settings.hidden = !open; byId("show-settings").setAttribute("aria-expanded", String(open));
}
function toggleList(open = !document.body.classList.contains("with-list")) {
  document.body.classList.toggle("with-list", open);
  byId("show-list").setAttribute("aria-expanded", String(open));
}

byId("composer").addEventListener("submit", (event) => { event.preventDefault(); if (isRunning()) stopAll(); else ask(prompt.value); });
scroll.addEventListener("scroll", drawEnd, { passive: true });
byId("to-end").addEventListener("click", toBottom);
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!isRunning()) ask(prompt.value); }
  if (event.key === "ArrowUp" && !prompt.value) {
    const asked = store.pathTo(current, current.leaf).findLast((node) => node.role === "user");
    const entry = asked && shown.get(asked.id);
    if (entry) { event.preventDefault(); edit(entry, "Ask", (said, images) => ask(said, asked.parent, images)); }
  }
});
document.addEventListener("keydown", (event) => {
  // keys are for the window that is open over the page
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (isRunning()) stopAll();
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
byId("system").addEventListener("change", () => {
  current.system = byId("system").value.trim();
  store.touch(current);
  save();
  if (!isRunning() && !pair && !log.querySelector(".editing")) drawLog();
});
byId("export-one").addEventListener("click", () => download("conversation.json", "application/json", JSON.stringify({ bessemer: "conversations", conversations: [current] }, null, 1)));
byId("export-all").addEventListener("click", () => download("conversations.json", "application/json", JSON.stringify({ bessemer: "conversations", conversations }, null, 1)));
byId("export-page").addEventListener("click", () => savePage(log, titleOf(current)));
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", async () => {
  const file = byId("import-file").files[0];
  byId("import-file").value = "";
  if (!file) return;
  let taken = [];
  try { taken = (JSON.parse(await file.text()).conversations ?? []).map((one) => store.checked(one, pictures.checkedImages)).filter(Boolean); } catch { /* not JSON */ }
  if (!taken.length) { say("the file holds no conversations"); alert("The file holds no conversations."); return; }
  conversations = [...conversations.filter((one) => !taken.some((other) => other.id === one.id)), ...taken];
  for (const conversation of taken) await save(conversation);
  open(taken[0]);
});

byId("attach").addEventListener("click", () => byId("attach-files").click());
byId("attach-files").addEventListener("change", () => { attachFiles(byId("attach-files").files); byId("attach-files").value = ""; });
byId("camera").addEventListener("click", () => byId("camera-file").click());
byId("camera-file").addEventListener("change", () => { attachFiles(byId("camera-file").files); byId("camera-file").value = ""; });
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])].filter(pictures.isPicture);
  // what was copied as text has often a picture of it, too
  if (!files.length || event.clipboardData.getData("text/plain") || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  attachFiles(files);
});
// another model may see, or not
for (const part of [settings, picker, byId("beside")]) part.addEventListener("change", updateSend);
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop") attachFiles(event.dataTransfer.files);
  });
}

begin();
store.all().catch(() => []).then((kept) => { conversations = kept; open(fromAddress(), false); store.onOthers(takeOthers); });
addEventListener("popstate", () => { const wanted = fromAddress(); if (wanted.id !== current.id && (Object.keys(wanted.nodes).length || Object.keys(current.nodes).length)) open(wanted, false); });
toggleList(matchMedia("(min-width: 64rem)").matches);
drawComparisons();
