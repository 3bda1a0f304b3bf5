// Markdown to nodes: markdown-it reads it (CommonMark, tables, struck text), and its tokens become elements here. Text only ever
// enters the page as text nodes; HTML in it is shown as it is written. Formulas are set by KaTeX, code is coloured by highlight.js:
// both are loaded when the first of them comes, and code is coloured on a thread of its own.
import { make } from "./page.js";
import MarkdownIt from "./vendor/markdown-it.js";

/** A line that says where references lead. */
const DEFINITION = /^ {0,3}\[[^\]\n]+\]:/m;
/** What is nested deeper, and longer lines, are shown as they are written. */
const DEEPEST = 60, LONGEST = 50_000;
/** Longer code is not coloured. */
const LONGEST_COLOURED = 100_000;

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: false, maxNesting: DEEPEST });
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
markdown.inline.ruler.before("escape", "formula", formulaInLine);
markdown.inline.ruler.before("link", "citation", citation);
markdown.block.ruler.before("fence", "formula", formulaInLines, { alt: ["paragraph", "reference", "blockquote", "list"] });

// --- what Markdown lacks --------------------------------------------------------------------------------------------------

/** `$…$`, `$$…$$`, `\(…\)` and `\[…\]` in a line. A dollar before a blank, or with a digit behind the second, is money. */
function formulaInLine(state, silent) {
  const { src, pos } = state;
  const opening = ["$$", "$", "\\(", "\\["].find((one) => src.startsWith(one, pos));
  if (!opening) return false;
  const closing = { "$$": "$$", $: "$", "\\(": "\\)", "\\[": "\\]" }[opening], start = pos + opening.length;
  let end = src.indexOf(closing, start);
  while (opening === "$" && end > 0 && src[end - 1] === "\\") end = src.indexOf(closing, end + 1);
  if (end <= start || end >= state.posMax) return false;
  if (opening === "$" && (/\s/.test(src[start]) || /\s/.test(src[end - 1]) || /\d/.test(src[end + 1] ?? "") || src.slice(start, end).includes("\n\n"))) return false;
  if (!silent) {
    const token = state.push("formula", "", 0);
    token.content = src.slice(start, end);
    token.meta = opening === "$$" || opening === "\\[";
  }
  state.pos = end + closing.length;
  return true;
}

/** A formula that stands in lines of its own. */
function formulaInLines(state, first, last, silent) {
  const text = (line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
  const opening = ["$$", "\\["].find((one) => text(first).startsWith(one));
  if (!opening || state.sCount[first] - state.blkIndent >= 4) return false;
  const closing = opening === "$$" ? "$$" : "\\]", parts = [];
  for (let line = first; line < last; line += 1) {
    if (line > first && state.sCount[line] < state.blkIndent) return false;
    const rest = line === first ? text(line).slice(opening.length) : text(line), end = rest.indexOf(closing);
    if (end < 0) { parts.push(rest); continue; }
    // text behind it belongs to a paragraph, with the formula in its line
    if (rest.slice(end + closing.length).trim()) return false;
    if (silent) return true;
    parts.push(rest.slice(0, end));
    const token = state.push("formula", "", 0);
    token.content = parts.join("\n").trim();
    token.meta = true;
    token.map = [first, line + 1];
    state.line = line + 1;
    return true;
  }
  return false;
}

/** The number of a source in brackets, in an answer from sources, whatever follows it. */
function citation(state, silent) {
  const found = state.env.cite && /^\[([0-9]{1,4})\]/.exec(state.src.slice(state.pos, state.pos + 6));
  if (!found) return false;
  if (!silent) state.push("citation", "", 0).content = found[1];
  state.pos += found[0].length;
  return true;
}

// --- tokens to nodes ------------------------------------------------------------------------------------------------------

const TAGS = { paragraph: "p", blockquote: "blockquote", bullet_list: "ul", ordered_list: "ol", list_item: "li", table: "table", thead: "thead", tbody: "tbody", tr: "tr", th: "th", td: "td", strong: "strong", em: "em", s: "s" };

function draw(tokens, parent, env) {
  const open = [parent];
  for (const token of tokens) {
    const node = open.at(-1);
    if (token.nesting < 0) { if (!token.hidden) open.pop(); continue; }
    if (token.nesting > 0) { if (!token.hidden) { const child = opened(token); node.append(child); open.push(child.querySelector("table") ?? child); } continue; }
    node.append(...alone(token, node, env));
  }
}

/** The element that an opening token begins. */
function opened(token) {
  const kind = token.type.replace("_open", "");
  switch (kind) {
    case "heading": return make(`h${Math.min(6, Number(token.tag.slice(1)) + 2)}`);
    case "link": return link(token.attrGet("href"));
    case "table": return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" }, make("table"));
    case "ordered_list": return make("ol", { start: token.attrGet("start") ?? undefined });
    case "th": return make("th", { scope: "col", class: aligned(token) });
    case "td": return make("td", { class: aligned(token) });
    default: return make(TAGS[kind] ?? "span");
  }
}

const aligned = (token) => /text-align:(right|center)/.exec(token.attrGet("style") ?? "")?.[1];

/** What a token without an end becomes. */
function alone(token, node, env) {
  switch (token.type) {
    case "inline": return inline(token, node, env);
    case "text": case "text_special": return [token.content];
    case "softbreak": return ["\n"];
    case "hardbreak": return [make("br")];
    case "code_inline": return [make("code", {}, token.content)];
    case "fence": return [drawCode(token.content, token.info.trim().split(/\s+/)[0])];
    case "code_block": return [drawCode(token.content, "")];
    case "hr": return [make("hr")];
    // pictures from elsewhere are never loaded: what they show stands in a link to them
    case "image": { const shown = link(token.attrGet("src")); shown.append(token.content || token.attrGet("src")); return [shown]; }
    case "citation": return [env.cite(Number(token.content)) ?? `[${token.content}]`];
    case "formula": return [formula(token.content, token.meta)];
    default: return [token.content];
  }
}

function inline(token, node, env) {
  if (token.content.length > LONGEST) return [token.content];
  const children = [...token.children], item = node.closest("li");
  const isFirst = item && !node.hasChildNodes() && (node === item || item.firstChild === node);
  const task = isFirst && /^\[([ xX])\] /.exec(children[0]?.type === "text" ? children[0].content : "");
  const box = make("span");
  if (task) {
    item.classList.add("task");
    children[0] = Object.assign(Object.create(Object.getPrototypeOf(children[0])), children[0], { content: children[0].content.slice(4) });
    box.append(make("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": task[1] === " " ? "to do" : "done" }), " ");
  }
  draw(children, box, env);
  return [...box.childNodes];
}

/** A link that is followed only when it is pressed, and tells nothing of this page; other targets than the web's are text. */
function link(target) {
  if (!/^(https?:|mailto:)/i.test(target ?? "")) return make("span", { title: target });
  return make("a", { href: target, rel: "noopener noreferrer nofollow", target: "_blank" });
}

function drawCode(text, language) {
  const copy = make("button", { class: "quiet", type: "button", onclick: async () => {
    await navigator.clipboard.writeText(code.textContent);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1200);
  } }, "Copy");
  const code = make("code", {}, text.replace(/\n$/, ""));
  return make("figure", { class: "code" }, make("figcaption", {}, make("span", {}, language || "text"), copy), make("pre", { tabindex: "0" }, code));
}

let colouring = null;
/** Blocks of code whose colours are still to come, by the number by which they were asked for. */
const uncoloured = new Map();
let asked = 0;

/** Colour the code in a block whose end has come, where its language is known. */
function colourAll(node) { for (const figure of node.matches("figure.code") ? [node] : node.querySelectorAll("figure.code")) colour(figure); }

function colour(figure) {
  const code = figure.querySelector("code"), language = figure.querySelector("figcaption span").textContent.toLowerCase();
  if (language === "text" || figure.dataset.coloured || code.textContent.length > LONGEST_COLOURED) return;
  figure.dataset.coloured = "asked";
  colouring ??= startColouring();
  asked += 1;
  uncoloured.set(asked, code);
  colouring.postMessage({ id: asked, text: code.textContent, language });
}

function startColouring() {
  const worker = new Worker(new URL("./colouring.js", import.meta.url), { type: "module" });
  const spans = (parts) => parts.map((part) => (typeof part === "string" ? part : make("span", { class: part[0] || undefined }, ...spans(part[1]))));
  worker.addEventListener("message", ({ data: { id, parts } }) => {
    if (parts) uncoloured.get(id).replaceChildren(...spans(parts));
    uncoloured.delete(id);
  });
  return worker;
}

let setting = null;
/** A formula: as it is written until KaTeX has come, and where it cannot be set. */
function formula(text, isDisplay) {
  const node = make("span", { class: isDisplay ? "formula display" : "formula" }, make("code", {}, text));
  setting ??= loadKatex();
  setting.then((katex) => {
    const set = make("span");
    try {
      katex.render(text, set, { displayMode: isDisplay, throwOnError: true, trust: false, strict: "ignore", errorColor: "var(--bad)", maxSize: 20, maxExpand: 500 });
      node.replaceChildren(...set.childNodes);
    } catch { /* stays as it is written */ }
  });
  return node;
}

async function loadKatex() {
  document.head.append(make("link", { rel: "stylesheet", href: new URL("./vendor/katex.css", import.meta.url).href }));
  return (await import("./vendor/katex.js")).default;
}

// --- a text that grows ----------------------------------------------------------------------------------------------------

/** The tokens of each block at the top, with the line it begins in. */
function blocksOf(tokens) {
  const blocks = [];
  for (const token of tokens) {
    if (token.level === 0 && token.nesting >= 0) blocks.push({ line: token.map?.[0] ?? 0, end: token.map?.[1] ?? 0, tokens: [] });
    blocks.at(-1).tokens.push(token);
  }
  return blocks;
}

/** A text that grows. Only its last block is read and drawn again when more comes; code that only grows is added to. */
export class MarkdownView {
  /** cite: makes the element of a citation, of its number, or null where it names no source; of an answer from sources. */
  constructor(node, text = "", cite = null) { this.node = node; this.text = ""; this.start = 0; this.open = null; this.code = null; this.cite = cite; this.env = {}; this.append(text); }

  append(more) {
    if (!more) return;
    const begun = this.text;
    this.text += more.replace(/\r\n?/g, "\n");
    if (this.code && !begun.endsWith("\n") && !/[\r\n`~]/.test(more)) { this.code.append(more); return; }
    const text = this.text.slice(this.start);
    // what defines a reference may be cut: only the whole text says what is referred to
    this.env = { cite: this.cite };
    const blocks = blocksOf(markdown.parse(text, this.env));
    this.open?.remove();
    this.open = this.code = null;
    for (const block of blocks) {
      const node = this.drawn(block, text);
      this.node.append(node);
      if (block !== blocks.at(-1)) { colourAll(node); continue; }
      const [only] = block.tokens;
      this.open = node;
      this.start += placeOf(text, block.line);
      if (only.type === "fence" && !isClosed(only, text)) this.code = node.querySelector("code");
    }
  }

  /** Draw what depends on the whole text, once no more comes. */
  finish() {
    if (DEFINITION.test(this.text)) {
      this.node.replaceChildren();
      const text = this.text;
      Object.assign(this, { text: "", start: 0, open: null, code: null });
      this.append(text);
    }
    if (this.open) colourAll(this.open);
  }

  drawn(block, text) {
    const box = make("div");
    if (block.tokens.some((token) => token.level >= DEEPEST - 2)) {
      box.append(make("p", {}, text.slice(placeOf(text, block.line), placeOf(text, block.end)).trimEnd()));
    } else draw(block.tokens, box, this.env);
    return box.childNodes.length === 1 && box.firstElementChild ? box.firstElementChild : box;
  }
}

/** Where a line of a text begins. */
function placeOf(text, line) {
  let place = 0;
  for (let number = 0; number < line; number += 1) {
    const end = text.indexOf("\n", place);
    if (end < 0) return text.length;
    place = end + 1;
  }
  return place;
}

/** Whether a block of code has its end. */
function isClosed(token, text) {
  const lines = text.slice(0, placeOf(text, token.map[1])).trimEnd().split("\n"), last = lines.at(-1).trim();
  return token.map[1] - token.map[0] > 1 && last.length >= token.markup.length && last === token.markup[0].repeat(last.length);
}
