// Markdown to nodes. Text only ever enters the page as text nodes; HTML in it is shown as it is written.
import { make } from "./page.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])[ \t]+(.*)$/;
const QUOTE = /^ {0,3}>[ \t]?(.*)$/;
const TABLE_RULE = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)+\|?[ \t]*$/;
/** Longer paragraphs are shown as they are written. */
const LONGEST = 20_000;

/** The blocks of a text from a place on: their kind, where they start, their lines, and of code whether its end has come. */
export function blocksOf(text, from = 0) {
  const lines = [];
  for (let start = from; start <= text.length;) {
    const end = text.indexOf("\n", start);
    lines.push({ start, text: text.slice(start, end < 0 ? undefined : end) });
    if (end < 0) break;
    start = end + 1;
  }
  const blocks = [];
  let at = 0;
  const take = (kind, count, more = {}) => { blocks.push({ kind, start: lines[at].start, lines: lines.slice(at, at + count).map((line) => line.text), ...more }); at += count; };
  while (at < lines.length) {
    const line = lines[at].text;
    if (!line.trim()) { at += 1; continue; }
    const fence = FENCE.exec(line);
    if (fence) {
      let end = at + 1;
      const isEnd = (text) => { const closes = FENCE.exec(text); return closes && !closes[2] && closes[1][0] === fence[1][0] && closes[1].length >= fence[1].length; };
      while (end < lines.length && !isEnd(lines[end].text)) end += 1;
      const closed = end < lines.length, body = lines.slice(at + 1, end).map((each) => each.text).join("\n");
      take("code", end - at + (closed ? 1 : 0), { language: fence[2], body, closed });
    } else if (HEADING.test(line)) take("heading", 1);
    else if (RULE.test(line)) take("rule", 1);
    else if (line.includes("|") && TABLE_RULE.test(lines[at + 1]?.text ?? "")) {
      let end = at + 2;
      while (end < lines.length && lines[end].text.includes("|")) end += 1;
      take("table", end - at);
    } else if (QUOTE.test(line)) {
      let end = at + 1;
      while (end < lines.length && lines[end].text.trim() && !FENCE.test(lines[end].text)) end += 1;
      take("quote", end - at);
    } else if (ITEM.test(line)) {
      const [, indent, mark] = ITEM.exec(line);
      let end = at + 1;
      // a list ends where items of the other kind begin, and behind a blank line where what follows is neither an item nor indented
      for (; end < lines.length; end += 1) {
        const next = lines[end].text, item = ITEM.exec(next);
        if (item ? item[1].length <= indent.length && /\d/.test(item[2]) !== /\d/.test(mark) : next.trim() && !lines[end - 1].text.trim() && !/^\s{2,}/.test(next)) break;
      }
      while (end > at + 1 && !lines[end - 1].text.trim()) end -= 1;
      take("list", end - at);
    } else {
      let end = at + 1;
      while (end < lines.length && lines[end].text.trim() && !FENCE.test(lines[end].text) && !HEADING.test(lines[end].text) && !ITEM.test(lines[end].text)) end += 1;
      take("paragraph", end - at);
    }
  }
  return blocks;
}

const PARTS = [
  "(?<ticks>`+)(?<code>.+?)\\k<ticks>(?!`)",
  "\\*\\*(?<strong>[^\\s*](?:.*?[^\\s])?)\\*\\*",
  "\\*(?<em>[^\\s*](?:[^*]*[^\\s*])?)\\*",
  "(?<!\\w)_(?<under>[^\\s_](?:[^_]*[^\\s_])?)_(?!\\w)",
  "~~(?<gone>[^~]+)~~",
  "!?\\[(?<label>[^\\]]*)\\]\\((?<target>[^\\s()]+)(?:[ \\t]+\"[^\"]*\")?\\)",
  "(?<url>https?://[^\\s<>\"']*[^\\s<>\"'.,;:!?)\\]])",
  "\\\\(?<escaped>[\\\\`*_{}\\[\\]()#+\\-.!~|>])",
];
const INLINE = new RegExp(PARTS.join("|"), "s");
/** The same of an answer from sources, whose numbers in brackets are citations, whatever follows them. */
const INLINE_CITING = new RegExp(["\\[(?<cited>[0-9]{1,4})\\]", ...PARTS].join("|"), "s");
/** Makes the element of a citation while a view of such an answer is drawn: of its number, or null where it names no source. */
let cite = null;

function inline(node, text) {
  if (text.length > LONGEST) { node.append(text); return node; }
  let rest = text;
  for (;;) {
    const found = (cite ? INLINE_CITING : INLINE).exec(rest);
    if (!found) break;
    if (found.index) node.append(rest.slice(0, found.index));
    const { cited, code, strong, em, under, gone, label, target, url, escaped } = found.groups;
    if (cited !== undefined) node.append(cite(Number(cited)) ?? found[0]);
    else if (code !== undefined) node.append(make("code", {}, code.trim() ? code.replace(/^ (.*) $/s, "$1") : code));
    else if (strong !== undefined) node.append(inline(make("strong"), strong));
    else if (em ?? under) node.append(inline(make("em"), em ?? under));
    else if (gone !== undefined) node.append(inline(make("s"), gone));
    else if (target !== undefined) node.append(link(target, label || target));
    else if (url !== undefined) node.append(link(url, url));
    else node.append(escaped);
    rest = rest.slice(found.index + found[0].length);
  }
  if (rest) node.append(rest);
  return node;
}

/** A link that is followed only when it is pressed, and tells nothing of this page; other targets than the web's are text. */
function link(target, label) {
  if (!/^(https?:|mailto:)/i.test(target)) return label === target ? label : `${label} (${target})`;
  return make("a", { href: target, rel: "noopener noreferrer nofollow", target: "_blank" }, label);
}

function drawList(lines) {
  const first = ITEM.exec(lines[0]);
  const depth = first[1].length, ordered = /\d/.test(first[2]);
  const list = make(ordered ? "ol" : "ul", ordered && parseInt(first[2], 10) !== 1 ? { start: String(parseInt(first[2], 10)) } : {});
  let body = null;
  const finish = () => { if (body) list.append(drawItem(body)); };
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= depth) { finish(); body = [item[3]]; }
    else body.push(line.slice(0, depth + 2).trim() ? line.trimStart() : line.slice(depth + 2));
  }
  finish();
  return list;
}

function drawItem(lines) {
  const node = make("li");
  const blocks = blocksOf(lines.join("\n"));
  // one paragraph stands in the item itself
  if (blocks[0]?.kind === "paragraph") inline(node, blocks.shift().lines.join("\n"));
  node.append(...blocks.map((block) => drawBlock(block)));
  return node;
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));
}

function drawTable(lines) {
  const head = make("tr", {}, ...cells(lines[0]).map((cell) => inline(make("th", { scope: "col" }), cell)));
  const rows = lines.slice(2).map((line) => make("tr", {}, ...cells(line).map((cell) => inline(make("td"), cell))));
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

function drawCode(block) {
  const copy = make("button", { class: "quiet", type: "button", onclick: async () => {
    await navigator.clipboard.writeText(code.textContent);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1200);
  } }, "Copy");
  const code = make("code", {}, block.body);
  return make("figure", { class: "code" }, make("figcaption", {}, make("span", {}, block.language || "text"), copy), make("pre", { tabindex: "0" }, code));
}

function drawBlock(block) {
  switch (block.kind) {
    case "code": return drawCode(block);
    case "heading": { const [, marks, text] = HEADING.exec(block.lines[0]); return inline(make(`h${Math.min(6, marks.length + 2)}`), text); }
    case "rule": return make("hr");
    case "table": return drawTable(block.lines);
    case "quote": return make("blockquote", {}, ...blocksOf(block.lines.map((line) => QUOTE.exec(line)?.[1] ?? line).join("\n")).map(drawBlock));
    case "list": return drawList(block.lines);
    default: return inline(make("p"), block.lines.join("\n"));
  }
}

/** A text that grows. Only its last block is drawn again when more comes; code that only grows is added to. */
export class MarkdownView {
  /** cite: of an answer from sources; see above. */
  constructor(node, text = "", cite = null) { this.node = node; this.text = ""; this.start = 0; this.open = null; this.code = null; this.cite = cite; this.append(text); }

  append(more) {
    if (!more) return;
    cite = this.cite;
    try { this.draw(more); } finally { cite = null; }
  }

  draw(more) {
    this.text += more;
    const blocks = blocksOf(this.text, this.start);
    const last = blocks.at(-1);
    if (!last) return;
    if (blocks.length === 1 && this.code && last.kind === "code" && !last.closed && last.body.startsWith(this.code.data)) {
      this.code.appendData(last.body.slice(this.code.data.length));
      return;
    }
    this.open?.remove();
    for (const block of blocks) {
      const node = drawBlock(block);
      this.node.append(node);
      if (block !== last) continue;
      this.open = node;
      this.start = block.start;
      this.code = block.kind === "code" ? (node.querySelector("code").firstChild ?? node.querySelector("code").appendChild(document.createTextNode(""))) : null;
    }
  }
}
