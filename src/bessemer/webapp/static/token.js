// This token: how surprising each of an answer was, what else could have come, what sampling makes of it, what each layer would have
// said, and where a head looks. What was recorded while it was sampled is shown at once; the rest the server computes.
import { byId, given, json, make, nameOfBlank, percent, promptly, table, visible } from "./page.js";
import { openChange } from "./change.js";
import { openForward } from "./forward.js";
import { growth } from "./growth.js";
import { origins } from "./origins.js";
import { drawLooked } from "./looked.js";
import { drawnFrom, leastEntropy, recorded, surprise } from "./sampled.js";

const side = byId("side");
let open = null;

/** Bits of surprise at which a token has the whole colour, and the share of the colour that it then has. */
const SURPRISING = 8, COLOUR = 46;

export function closeToken() {
  if (!open) return;
  open.strip.remove();
  open.entry.text.hidden = false;
  open = null;
  side.hidden = true;
  document.body.classList.remove("with-side");
}

const known = new Map();
async function piecesOf(model, ids) {
  const texts = known.get(model) ?? known.set(model, new Map()).get(model);
  const unknown = [...new Set(ids)].filter((id) => !texts.has(id));
  if (unknown.length) {
    const { pieces } = await json("inspect/pieces", { body: { model, ids: unknown } });
    unknown.forEach((id, place) => texts.set(id, pieces[place]));
  }
  return ids.map((id) => texts.get(id));
}
const pieceOf = (id) => known.get(open.entry.node.settings.model)?.get(id) ?? "";

/** Show an answer in its tokens; `goOn(node, place, id, beginning)` makes a branch from another one. images: those of its prompt, in
 *  order. Pressed again, as it was. */
export async function openTokens(entry, goOn, images = []) {
  const again = open?.entry === entry;
  closeToken();
  if (again) return;
  const { node } = entry, places = node.ids.map((_, place) => recorded(node, place));
  const others = places.flatMap((own) => own?.alternatives.map((one) => one.id) ?? []);
  const pieces = (await piecesOf(node.settings.model, [...node.ids, ...others])).slice(0, node.ids.length);
  if (open) return;
  const tokens = make("div", { class: places.some(Boolean) ? "tokens pressable skin" : "tokens pressable", role: "group", "aria-label": "Tokens of the answer, by their surprise" },
    ...pieces.map((piece, place) => {
      const own = places[place];
      const button = make("button", { type: "button", class: own ? undefined : `t${place % 5}`, tabindex: place ? "-1" : "0", "aria-label": nameOfBlank(piece), onclick: () => choose(place) }, piece.includes("\n") ? `${visible(piece)}\n` : piece || "∅");
      if (own) tint(button, own.probability);
      return button;
    }));
  const strip = make("div", { class: "strip" }, tokens);
  open = { entry, strip, tokens, places, pieces, goOn, images, look: { layer: null, head: null, whole: false, patch: null }, place: 0, head: null, settings: { temperature: 1, top_p: 1, top_k: 0, ...node.settings } };
  if (places.some(Boolean)) strip.append(drawSpark(), make("p", { class: "reading soft" }));
  if (places.some(Boolean) && isOfRun(node.settings.model) && !images.length) {
    const answer = { model: node.settings.model, before: node.promptIds, ids: node.ids };
    open.growth = growth(answer, (shares) => {
      shares.forEach((share, place) => { if (share !== null) tint(tokens.children[place], share); });
      if (open) drawReading(open.place);
    });
    strip.append(open.growth.box, origins(answer));
  }
  const read = (event) => { const place = [...tokens.children].indexOf(event.target.closest("button")); if (place >= 0) drawReading(place); };
  tokens.addEventListener("pointerover", read);
  tokens.addEventListener("pointerleave", () => open && drawReading(open.place));
  tokens.addEventListener("keydown", moveByKeys);
  entry.text.hidden = true;
  entry.text.after(strip);
  build();
  choose(0);
}

/** Whether the models before this one are known here: of the first model, and where a run made it. */
const isOfRun = (model) => Boolean(given.run) && given.made.includes(model);

/** Colour a token by its surprise. */
function tint(button, probability) {
  const share = Math.min(1, surprise({ probability }) / SURPRISING);
  button.style.backgroundColor = `color-mix(in oklab, var(--heat) ${Math.round(COLOUR * share)}%, transparent)`;
}

// --- the skin -------------------------------------------------------------------------------------------------------------

function moveByKeys(event) {
  const last = open.pieces.length - 1, { place } = open;
  const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: last, ArrowUp: lineAway(-1), ArrowDown: lineAway(1) }[event.key];
  if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(last, to)));
  open.tokens.children[open.place].focus();
}

/** The place of the token nearest above or below the chosen one. */
function lineAway(step) {
  const boxes = [...open.tokens.children].map((button) => button.getBoundingClientRect()), from = boxes[open.place];
  const away = boxes.map((box, place) => ({ place, down: step * (box.top - from.top), across: Math.abs(box.left - from.left) })).filter((one) => one.down > from.height / 2);
  if (!away.length) return open.place;
  const nearest = Math.min(...away.map((one) => one.down));
  return away.filter((one) => one.down < nearest + from.height / 2).sort((one, two) => one.across - two.across)[0].place;
}

const SVG = "http://www.w3.org/2000/svg";
function shape(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

/** Entropy along the answer as a line, and the surprise of each token as a bar; pressed, it chooses the token there. */
function drawSpark() {
  const { places } = open, count = places.length;
  const bits = Math.max(4, ...places.map((own) => (own ? Math.max(surprise(own), leastEntropy(own)) : 0)));
  const y = (value) => (30 - (28 * Math.min(value, bits)) / bits).toFixed(2);
  const svg = shape("svg", { viewBox: `0 0 ${count} 30`, preserveAspectRatio: "none", class: "spark", role: "img", "aria-label": `Entropy before each token, up to ${bits.toFixed(1)} bits, and how surprising the token was` });
  places.forEach((own, place) => { if (own) svg.append(shape("rect", { x: place + 0.15, width: 0.7, y: y(surprise(own)), height: (30 - y(surprise(own))).toFixed(2), class: "surprise" })); });
  const points = places.flatMap((own, place) => (own ? [`${place},${y(leastEntropy(own))} ${place + 1},${y(leastEntropy(own))}`] : []));
  svg.append(shape("polyline", { points: points.join(" "), class: "entropy", "vector-effect": "non-scaling-stroke" }));
  open.cursor = svg.appendChild(shape("rect", { x: 0, y: 0, width: 1, height: 30, class: "cursor" }));
  const placeAt = (event) => { const box = svg.getBoundingClientRect(); return Math.max(0, Math.min(count - 1, Math.floor((count * (event.clientX - box.left)) / box.width))); };
  svg.addEventListener("pointermove", (event) => drawReading(placeAt(event)));
  svg.addEventListener("click", (event) => choose(placeAt(event)));
  return svg;
}

/** One line about a token: how likely it was, and the likeliest others. */
function drawReading(place) {
  const line = open.strip.querySelector(".reading"), own = open.places[place];
  if (!line) return;
  if (!own) { line.replaceChildren(make("code", {}, visible(open.pieces[place])), " was not sampled"); return; }
  const others = own.alternatives.filter((one) => one.id !== open.entry.node.ids[place]).slice(0, 3), grew = open.growth?.of(place);
  if (grew) { line.replaceChildren(make("code", {}, visible(open.pieces[place])), ` ${grew}`); return; }
  line.replaceChildren(make("code", {}, visible(open.pieces[place])), ` ${percent(own.probability)}, ${surprise(own).toFixed(1)} bits; entropy ≥ ${leastEntropy(own).toFixed(1)} bits`,
    ...(others.length ? ["; also ", ...others.flatMap((one, index) => [index ? ", " : "", make("code", {}, visible(pieceOf(one.id))), ` ${percent(one.probability)}`])] : []));
}

function choose(place) {
  open.place = place;
  const before = open.tokens.querySelector("[aria-current]"), now = open.tokens.children[place];
  before?.removeAttribute("aria-current");
  for (const button of [before ?? open.tokens.children[0], now]) button.tabIndex = button === now ? 0 : -1;
  now.setAttribute("aria-current", "true");
  now.scrollIntoView({ block: "nearest" });
  open.cursor?.setAttribute("x", String(place));
  delete side.dataset.place;
  drawReading(place);
  drawNumbers(null);
  for (const id of ["token-pictures", "token-lens", "token-attention", "token-experts"]) byId(id).classList.add("waiting");
  byId("token-lineage").replaceChildren();
  load();
}

// --- the panel ------------------------------------------------------------------------------------------------------------

// keys that are held choose many tokens: the first is asked of at once, then one each pause
const load = promptly(60, async () => {
  if (!open) return;
  const { entry, place, settings, head } = open, asked = open, node = entry.node;
  const body = {
    ...chosen(), attention: head,
    temperature: settings.temperature, top_p: settings.top_p, top_k: settings.top_k || 0, min_p: settings.min_p || 0,
  };
  try {
    const found = await json("inspect/token", { body });
    if (open !== asked || open.place !== place) return;
    side.querySelector("#token-failure").replaceChildren();
    drawNumbers(found);
    if (open.images.length) open.showPatch = await drawLooked(byId("token-pictures"), chosen(), open.images, open.look, () => open !== asked || open.place !== place);
    if (open !== asked || open.place !== place) return;
    drawLens(found);
    await drawAttention(found);
    drawExperts(found);
    if (!byId("token-lineage").hasChildNodes()) drawLineage();
    for (const waiting of side.querySelectorAll(".waiting")) waiting.classList.remove("waiting");
    side.dataset.place = String(place);
  } catch (error) {
    if (open === asked) side.querySelector("#token-failure").replaceChildren(error.message);
  }
});

/** The panel's parts; the sliders stay while another token is chosen. */
function build() {
  side.hidden = false;
  document.body.classList.add("with-side");
  const slider = (name, label, most, step) => {
    const output = make("output", {}, String(open.settings[name] ?? 0));
    return make("label", {}, make("span", {}, label, " ", output), make("input", {
      type: "range", "aria-label": label, min: name === "top_p" ? "0.05" : "0", max: String(most), step: String(step), value: String(open.settings[name] ?? 0),
      oninput: (event) => { open.settings[name] = Number(event.target.value); output.textContent = event.target.value; drawNumbers(null); load(); },
    }));
  };
  const move = (step, label, sign) => make("button", { class: "quiet", type: "button", "aria-label": label, title: `${label} (arrow keys)`, onclick: () => choose(Math.max(0, Math.min(open.pieces.length - 1, open.place + step))) }, sign);
  // a copy can be looked into of the first model alone
  const canChange = !open.images.length && given.inside && given.made.includes(open.entry.node.settings.model);
  side.replaceChildren(
    make("div", { class: "row" }, make("h2", {}, "This token"), make("span", { class: "space" }), move(-1, "Token before", "‹"), move(1, "Next token", "›"), make("button", { class: "quiet", type: "button", onclick: closeToken, "aria-label": "Close" }, "×")),
    make("p", { id: "token-failure", class: "failure" }), make("div", { id: "token-numbers" }),
    make("div", { class: "row ways" }, make("button", { class: "quiet bordered", type: "button", title: "Its way through the model, step by step", onclick: follow }, "Follow its way"),
      canChange && make("button", { class: "quiet bordered", type: "button", title: "Silence, patch or steer a part of the model, and see how the text goes on", onclick: change }, "Change it and see")),
    make("div", { class: "sliders" }, slider("temperature", "Temperature", 2, 0.05), slider("top_p", "Top p", 1, 0.05), slider("top_k", "Top k", 100, 1)),
    make("div", { id: "token-alternatives" }), make("div", { id: "token-pictures" }), make("div", { id: "token-lens" }), make("div", { id: "token-attention" }), make("div", { id: "token-experts" }), make("div", { id: "token-lineage" }),
  );
}

/** The chosen token with the ones before it, as the server is asked of it. */
function chosen() {
  const { entry: { node }, place } = open;
  const images = open.images.length ? { images: open.images.map((one) => one.data) } : {};
  return { model: node.settings.model, before: [...node.promptIds, ...node.ids.slice(0, place)], token: node.ids[place], ...images };
}
function follow() { openForward(chosen(), open.pieces[open.place], open.settings); }
async function change() {
  const asked = chosen(), piece = open.pieces[open.place];
  openChange(asked, piece, await piecesOf(asked.model, asked.before));
}

/** The numbers of the chosen token: those recorded when it was sampled, at once; what was not recorded, once the server has computed
 *  it. found: what that was; null: not yet. */
function drawNumbers(found) {
  const { entry, place, settings } = open, id = entry.node.ids[place], own = open.places[place];
  if (!own && !found) { byId("token-numbers").replaceChildren(make("p", { class: "soft" }, "Reading …")); byId("token-alternatives").replaceChildren(); return; }
  const drawn = own && drawnFrom(own, settings), computed = new Map([...(found?.alternatives ?? []), ...(found ? [found.token] : [])].map((one) => [one.id, one]));
  const sampled = (one) => (drawn ? (drawn.shares.get(one) ?? (drawn.kept === null ? undefined : 0)) : computed.get(one)?.sampled);
  // the token that came stands last where it is not among the likeliest
  const recordedOnes = own && (own.rank === null ? [...own.alternatives, { id, probability: own.probability }] : own.alternatives);
  const alternatives = own ? recordedOnes.map((one) => ({ ...one, piece: pieceOf(one.id), sampled: sampled(one.id) })) : found.alternatives;
  const probability = own?.probability ?? found.token.probability, rank = own?.rank ?? found?.token.rank;
  const entropy = found ? `${found.entropy_bits.toFixed(2)} bits` : `≥ ${leastEntropy(own).toFixed(2)} bits`;
  const kept = drawn?.kept ?? found?.kept, fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
  byId("token-numbers").replaceChildren(make("p", { class: "chosen" }, make("code", {}, visible(open.pieces[place])), ` id ${id}, token ${place + 1} of ${open.pieces.length}`),
    make("dl", { class: "facts" }, fact("probability", percent(probability)), fact("rank", rank?.toLocaleString("en") ?? `> ${own.alternatives.length}`),
      fact("entropy", entropy), fact("may be drawn", kept === undefined ? "…" : `${kept.toLocaleString("en")}${found ? ` of ${found.vocabulary.toLocaleString("en")}` : ""}`)));
  const most = Math.max(...alternatives.map((one) => Math.max(one.probability, one.sampled ?? 0)), 1e-9);
  const bar = (share, kind) => { const inner = make("i", { class: kind }); inner.style.width = `${(100 * (share ?? 0)) / most}%`; inner.hidden = !share; return make("span", { class: "bar" }, inner); };
  const rows = alternatives.map((one) => make("li", {}, make("button", {
    type: "button", class: one.id === id ? "same" : undefined, disabled: one.id === id, title: one.id === id ? "The token that came" : "Go on from here with this one",
    onclick: () => { const { goOn, pieces } = open; closeToken(); goOn(entry.node, place, one.id, pieces.slice(0, place).join("") + one.piece); },
  }, make("code", {}, visible(one.piece)), make("span", { class: "two-bars" }, bar(one.probability, "model"), bar(one.sampled, "sampled")), make("span", { class: "number" }, percent(one.probability), make("br"), one.sampled === undefined ? "…" : one.sampled ? percent(one.sampled) : "–"))));
  const whose = own ? "Above the model's own probability when it was sampled" : "Above the model's own probability, computed again";
  byId("token-alternatives").replaceChildren(make("h3", {}, "What could have come"), make("p", { class: "soft" }, `${whose}, below what is drawn from at these settings. Press one to go on from it.`), make("ol", { class: "alternatives" }, ...rows));
}

function drawLens(found) {
  const rows = [...found.lens].reverse().map((row) => make("tr", {}, make("td", {}, row.after),
    make("td", {}, ...row.likeliest.flatMap((one) => [make("code", { title: percent(one.probability) }, visible(one.piece)), " "])),
    make("td", { class: "number" }, percent(row.probability)), make("td", { class: "number" }, row.rank.toLocaleString("en"))));
  byId("token-lens").replaceChildren(make("h3", {}, "Layer by layer"), make("p", { class: "soft" }, "What would come if the model ended there (the logit lens), and how likely and which in rank the token was."),
    table("Layer by layer", ["after", "likeliest", "token", "rank"], rows));
}

async function drawAttention(found) {
  const choice = (name, count) => {
    const select = make("select", { "aria-label": name }, ...Array.from({ length: count }, (_, number) => make("option", { value: String(number) }, `${name} ${number}`)));
    select.value = String(open.head?.[name] ?? 0);
    return select;
  };
  const layer = choice("layer", found.layers), head = choice("head", found.heads);
  const look = () => { open.head = { layer: Number(layer.value), head: Number(head.value) }; load(); };
  layer.addEventListener("change", look);
  head.addEventListener("change", look);
  const parts = [make("h3", {}, "Where a head looks"), make("div", { class: "row" }, layer, head, make("button", { class: "quiet", type: "button", onclick: look }, "Look"))];
  if (found.attention) {
    const { node } = open.entry, ids = found.before ?? [...node.promptIds, ...node.ids.slice(0, open.place)], pieces = await piecesOf(node.settings.model, ids);
    // the tokens of a square of a picture as one, which is coloured by all of them
    const units = [];
    ids.forEach((id, place) => {
      const last = units.at(-1), weight = found.attention[place] ?? 0, isPatch = id === found.image_token_id;
      if (isPatch && last?.isPatch) { last.count += 1; last.weight += weight; } else units.push({ place, weight, isPatch, count: 1 });
    });
    const most = Math.max(...units.map((one) => one.weight), 1e-9);
    parts.push(make("p", { class: "looked-at", tabindex: "0" }, ...units.map(({ place, weight, isPatch, count }) => {
      const span = isPatch ? make("button", { type: "button", class: "patches", title: `${percent(weight)}: show where they are`, onclick: () => open.showPatch?.(place) }, `${count} patch${count === 1 ? "" : "es"}`) : make("span", { title: percent(weight) }, pieces[place] || "∅");
      span.style.backgroundColor = `color-mix(in oklab, var(--heat) ${Math.round((COLOUR * weight) / most)}%, transparent)`;
      return span;
    })));
  }
  byId("token-attention").replaceChildren(...parts);
}

/** Sections that are asked for by a press, since they read models and documents. */
function drawLineage() {
  const { model } = open.entry.node.settings;
  if (!isOfRun(model)) { byId("token-lineage").replaceChildren(); return; }
  const section = (title, what, path, drawn) => {
    const box = make("div", {});
    const ask = make("button", { class: "quiet", type: "button" }, what);
    ask.addEventListener("click", async () => {
      const { node } = open.entry, place = open.place;
      box.replaceChildren(make("p", { class: "soft" }, "Reading …"));
      try {
        const found = await json(path, { body: { model, before: [...node.promptIds, ...node.ids.slice(0, place)], token: node.ids[place] } });
        if (open?.place === place) box.replaceChildren(...drawn(found));
      } catch (error) {
        box.replaceChildren(make("p", { class: "failure" }, error.message));
      }
    });
    return [make("h3", {}, title), ask, box];
  };
  byId("token-lineage").replaceChildren(
    ...section("Earlier in the run", "Ask the earlier models", "inspect/earlier", drawEarlier),
    ...section("In the training data", "Look for the words before it", "inspect/training", drawTraining));
}

function drawEarlier({ models }) {
  const rows = models.map((one) => make("tr", {}, make("td", {}, one.step === null ? one.stage : `${one.stage}, step ${one.step.toLocaleString("en")}`),
    ...(one.problem ? [make("td", { colspan: "3", class: "soft" }, one.problem)] : [
      make("td", {}, ...one.likeliest.flatMap((other) => [make("code", { title: percent(other.probability) }, visible(other.piece)), " "])),
      make("td", { class: "number" }, percent(one.probability)), make("td", { class: "number" }, one.rank.toLocaleString("en"))])));
  return [table("Earlier models", ["model", "likeliest", "token", "rank"], rows)];
}

function drawTraining({ run, stage, passages, looked_at, documents, examples, rows, example_stages }) {
  const looked = looked_at < documents ? `${looked_at.toLocaleString("en")} of ${documents.toLocaleString("en")}` : `all ${documents.toLocaleString("en")}`;
  const head = stage === null ? null : make("p", { class: "soft" }, passages.length ? `The longest sequence that ends here, in ${looked} training documents of ${stage}.` : `Not two tokens that end here stand in ${looked} training documents of ${stage}.`);
  const where = `${rows.toLocaleString("en")} rows of ${example_stages.join(", ")}`;
  const below = example_stages.length ? make("p", { class: "soft" }, examples.length ? `In ${where}:` : `Not two tokens that end here stand in ${where}.`) : null;
  const shown = examples.map((one) => make("div", { class: "passage" },
    make("p", {}, one.left, make("mark", {}, one.found), one.right),
    make("p", { class: "soft" }, `${one.stage}${one.kind === one.stage ? "" : ` (${one.kind})`} · ${one.part} of row ${one.row.toLocaleString("en")} of ${one.file}${one.split ? ` · ${one.split}` : ""}`)));
  return [...(head ? [head] : []), ...documentPassages(run, stage, passages), ...(below ? [below] : []), ...shown];
}

function documentPassages(run, stage, passages) {
  return [...passages.map((one) => make("div", { class: "passage" },
    make("p", {}, one.left, make("mark", {}, one.found), one.right),
    make("p", { class: "soft" }, one.url ?? one.source, " · ", make("a", { href: `data?${new URLSearchParams({ run, stage, id: one.id })}` }, "what the filters said")),
    make("details", {}, make("summary", {}, "scores"), make("p", { class: "soft" }, Object.entries(one.scores).map(([name, value]) => `${name.replaceAll("_", " ")} ${Number(Number(value).toPrecision(3))}`).join(" · ")))))];
}

function drawExperts(found) {
  if (!found.experts.length) return;
  const rows = found.experts.map(({ layer, experts, weights }) => make("tr", {}, make("td", {}, `layer ${layer}`), make("td", {}, experts.map((expert, place) => `${expert} (${percent(weights[place])})`).join(", "))));
  byId("token-experts").replaceChildren(make("h3", {}, "Experts"), make("table", {}, make("tbody", {}, ...rows)));
}
