// What all pages share: elements, the server's API with its key, the theme, and saving a view as one file.

export const byId = (id) => document.getElementById(id);
export const given = JSON.parse(byId("given").textContent);

/** An element with properties and children. Text enters as text nodes alone: nothing here parses HTML. */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** A table that scrolls by itself where it is too wide, also by keys. heads: of its columns; rows: elements. */
export function table(label, heads, rows) {
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((head) => (head === "" ? make("td") : make("th", { scope: "col" }, head))))), make("tbody", {}, ...rows)));
}

/** Tell those who do not see the page. */
export function say(text) { byId("said").textContent = text; }

const KEY = "bessemer-key";

let asked = null;
/** Ask for a key, once for all requests that wait for one; resolves to whether one was given. isWrong: whether the last one was not
 *  accepted. The dialog may be closed without one. */
function askForKey(isWrong) {
  asked ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key").value = dialog.returnValue = "";
    byId("key-wrong").hidden = !isWrong;
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asked = null;
      const key = dialog.returnValue === "use" ? byId("key").value.trim() : "";
      if (key) sessionStorage.setItem(KEY, key);
      resolve(Boolean(key));
    }, { once: true });
  });
  return asked;
}

/** An error that the server explains. */
export class Refused extends Error {
  constructor(message, status, code) { super(message); this.status = status; this.code = code; }
}

/** A request of the API, of JSON or of a form; asks for a key where the server wants one, until it is right. Raises Refused, or an error in plain words. */
export async function request(path, { body, method = body === undefined ? "GET" : "POST", signal } = {}) {
  // a connection that was kept for the next request may have been closed by the server just now
  let mayRepeat = method === "GET" || method === "DELETE";
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const isForm = body instanceof FormData;
    const headers = { ...(body === undefined || isForm ? {} : { "Content-Type": "application/json" }), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { method, headers, body: body === undefined || isForm ? body : JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      if (mayRepeat) { mayRepeat = false; continue; }
      throw new Error("the server does not answer");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      if (key !== null && key === sessionStorage.getItem(KEY)) sessionStorage.removeItem(KEY);
      // another request may have been given one meanwhile
      if (sessionStorage.getItem(KEY) !== null || await askForKey(key !== null)) continue;
    }
    let said = {};
    try { said = (await response.json()).error ?? {}; } catch { /* not JSON */ }
    throw new Refused(said.message ?? `the server answers ${response.status}`, response.status, said.code);
  }
}

export async function json(path, options) { return (await request(path, options)).json(); }

/** The events of a stream, parsed, to its end. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (waiting + value).split("\n");
      waiting = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        if (line === "data: [DONE]") return;
        yield JSON.parse(line.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A token's text with its blanks and control characters made visible. */
export function visible(piece) {
  return piece.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\p{C}\p{Z}]/gu, (one) => `U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`) || "∅";
}

/** What a token's button is called where its text says nothing: blanks and control characters alone. */
export const nameOfBlank = (piece) => /[^\p{C}\p{Z}]/u.test(piece) ? undefined : visible(piece);

export const percent = (share) => share > 0 && share < 0.00005 ? "< 0.01 %" : `${(100 * share).toFixed(share >= 0.0995 ? 0 : share >= 0.00995 ? 1 : 2)} %`;

/** Let the browser draw, and take what was pressed, before the work goes on. */
export const pause = () => globalThis.scheduler?.yield?.() ?? new Promise((go) => setTimeout(go));

/** A whole number with commas; the browser's own formatter takes 10 ms to load. */
export const whole = (number) => String(Math.round(number)).replace(/\B(?=(\d{3})+$)/g, ",");

/** A function that runs once a pause has come. */
export function calm(milliseconds, work) {
  let timer;
  return (...values) => { clearTimeout(timer); timer = setTimeout(() => work(...values), milliseconds); };
}

/** A function that runs at once, and where it did so within the pause, once when that is over. */
export function promptly(milliseconds, work) {
  let timer, last = -Infinity;
  return (...values) => {
    clearTimeout(timer);
    const run = () => { last = performance.now(); work(...values); }, wait = last + milliseconds - performance.now();
    if (wait <= 0) run();
    else timer = setTimeout(run, wait);
  };
}

export function download(name, type, content) {
  const link = make("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/"/g, "&quot;");

/** The view as one HTML file that needs nothing else: its styles within, without what can be pressed. */
export async function savePage(view, title) {
  const links = [...document.querySelectorAll("link[rel=stylesheet]")].map((link) => link.href);
  const sheets = await Promise.all(links.map(async (href) => (await fetch(href)).text()));
  sheets.push(...document.adoptedStyleSheets.flatMap((sheet) => [...sheet.cssRules].map((rule) => rule.cssText)));
  const copy = view.cloneNode(true);
  const pictures = [...view.querySelectorAll("canvas")].map((canvas) => make("img", { src: canvas.toDataURL(), alt: canvas.closest("[aria-label]")?.getAttribute("aria-label") ?? "" }));
  copy.querySelectorAll("canvas").forEach((canvas, number) => canvas.replaceWith(pictures[number]));
  // without KaTeX's fonts, browsers draw a formula from what it says for those who do not see it
  copy.querySelectorAll(".katex-html").forEach((node) => node.remove());
  copy.querySelectorAll(".katex-mathml").forEach((node) => node.classList.remove("katex-mathml"));
  copy.querySelectorAll(".cite, .sources button").forEach((node) => node.replaceWith(node.matches(".cite") ? `[${node.textContent}]` : node.textContent));
  copy.querySelectorAll("button, form, select, textarea, [hidden]").forEach((node) => node.remove());
  download(`${title.replace(/[^\w-]+/g, "-").slice(0, 60) || "page"}.html`, "text/html", `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>${escaped(title)}</title>
<style>
${sheets.join("\n").replace(/<\//g, "<\\/")}
</style>
</head>
<body class="saved">
<h1>${escaped(title)}</h1>
${copy.outerHTML}
</body>
</html>
`);
}

const sheets = new Set();

/** HTML that this server's own views have drawn, as nodes. The page's policy lets no style in that stands in HTML, so the server
 *  calls them `data-style` and `data-sheet`, and they are set here. */
export function drawn(html) {
  const parsed = new DOMParser().parseFromString(html, "text/html");
  parsed.querySelectorAll("script, link, meta, base, iframe, object, embed").forEach((node) => node.remove());
  const fragment = document.createDocumentFragment();
  fragment.append(...[...parsed.body.childNodes].map((node) => document.importNode(node, true)));
  for (const node of fragment.querySelectorAll("[data-style]")) {
    node.style.cssText = node.dataset.style;
    delete node.dataset.style;
  }
  for (const node of fragment.querySelectorAll("[data-sheet]")) {
    if (!sheets.has(node.textContent)) {
      const sheet = new CSSStyleSheet();
      sheet.replaceSync(node.textContent);
      sheets.add(node.textContent);
      document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
    }
    node.remove();
  }
  return fragment;
}

const THEME = "bessemer-theme";
function setTheme(theme) { if (theme) document.documentElement.dataset.theme = theme; }
setTheme(localStorage.getItem(THEME));
byId("theme").addEventListener("click", () => {
  const isDark = (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  localStorage.setItem(THEME, isDark ? "light" : "dark");
  setTheme(isDark ? "light" : "dark");
});
