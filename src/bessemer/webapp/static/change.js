// Change it and see: a part of the model silenced, patched or steered, or a word of the prompt another, and both continuations
// side by side.
import { events, json, make, percent, request, table, visible } from "./page.js";
import { showDialog } from "./dialog.js";

const ROLES = { previous_token: "looks at the token before", same_token: "looks at the same token", induction: "continues as before", first_token: "rests on the first token" };
const KINDS = { head: "Silence a head", layer: "Silence a layer", edit: "Another word", patch: "Patch from another word", steer: "Steer" };
/** Words of the prompt that are shown, the last ones. */
const WORDS = 160;

/** Open it for a token. asked: { model, before, token }; pieces: the texts of the tokens before. */
export async function openChange(asked, piece, pieces) {
  const state = { asked, piece, words: wordsOf(pieces), word: null, heads: null, whole: null, stop: null };
  const box = make("div", { class: "changing" }, make("p", { class: "soft" }, "Measuring what heads look for …"));
  showDialog("change", ["Change what made ", make("code", {}, visible(piece))], box, () => state.stop?.abort());
  try {
    state.heads = await json("inspect/heads");
    build(state, box);
  } catch (error) {
    box.replaceChildren(make("p", { class: "failure" }, error.message));
  }
}

/** Tokens as words: a new one begins at a blank or a line's end. [{ first, last, text }] */
function wordsOf(pieces) {
  const words = [];
  pieces.forEach((piece, place) => {
    const before = words.at(-1);
    if (before && !/^\s/.test(piece) && !/\s$/.test(before.text) && !/^<\|/.test(piece) && !/\|>$/.test(before.text)) { before.last = place; before.text += piece; } else words.push({ first: place, last: place, text: piece });
  });
  return words;
}

function build(state, box) {
  const kind = make("select", { name: "kind", "aria-label": "What is changed" }, ...Object.entries(KINDS).map(([name, label]) => make("option", { value: name }, label)));
  const fields = make("div", { class: "fields" }), results = make("div", { class: "results" }), note = make("p", { class: "soft", role: "status" });
  const form = make("form", {}, make("label", {}, make("span", {}, "Change"), kind), fields, make("div", { class: "row" }, make("button", { class: "strong" }, "Go on with it")));
  kind.addEventListener("change", () => drawFields(state, kind.value, fields));
  form.addEventListener("submit", (event) => { event.preventDefault(); run(state, kind.value, form, note, results); });
  box.replaceChildren(form, note, results);
  drawFields(state, "head", fields);
}

const number = (name, label, value, most) => make("label", {}, make("span", {}, label), make("input", { type: "number", name, min: "0", max: String(most), value: String(value), required: true }));

function drawFields(state, kind, fields) {
  const { layers, heads, names } = state.heads, middle = Math.floor(layers / 2);
  if (kind === "head") {
    const head = make("select", { name: "head" }), layer = number("layer", "Layer", 0, layers - 1);
    const offer = () => {
      const of = Number(layer.querySelector("input").value), was = head.value;
      head.replaceChildren(...Array.from({ length: heads }, (_, place) => {
        const named = names.find((one) => one.layer === of && one.head === place);
        return make("option", { value: String(place) }, `head ${place}${named ? ` ${ROLES[named.role]} (${percent(named.score)})` : ""}`);
      }));
      head.value = was || "0";
    };
    layer.addEventListener("input", offer);
    offer();
    fields.replaceChildren(layer, make("label", { class: "grow" }, make("span", {}, "Head, and what it was measured to do"), head));
  }
  if (kind === "layer") fields.replaceChildren(number("layer", "Layer that adds nothing", middle, layers - 1));
  if (kind === "edit" || kind === "patch") {
    const word = make("div", { class: "words", role: "group", "aria-label": "Choose a word of what came before" }), input = make("input", { name: "text", "aria-label": "The word in its place", required: true });
    const choose = (one, button) => {
      state.word = one;
      word.querySelector("[aria-pressed=true]")?.setAttribute("aria-pressed", "false");
      button.setAttribute("aria-pressed", "true");
      input.value = one.text.trim();
      input.select();
    };
    word.append(...state.words.slice(-WORDS).map((one) => {
      const button = make("button", { type: "button", "aria-pressed": "false", "aria-label": one.text.trim() ? undefined : visible(one.text), onclick: () => choose(one, button) }, one.text.trim() ? one.text : visible(one.text));
      return button;
    }));
    fields.replaceChildren(make("div", { class: "grow" }, make("span", { class: "soft" }, "Choose a word of what came before:"), word), make("label", {}, make("span", {}, "In its place"), input));
    if (kind === "patch") fields.append(number("layer", "State behind layer", middle, layers - 1));
    const last = state.words.findLastIndex((one) => /\p{L}{3}/u.test(one.text) && !/^<\|/.test(one.text)), shown = state.words.slice(-WORDS);
    if (last >= 0 && shown.includes(state.words[last])) choose(state.words[last], word.children[shown.indexOf(state.words[last])]);
  }
  if (kind === "steer") {
    const list = (name, label, value) => { const area = make("textarea", { name, rows: "3", required: true }); area.value = value; return make("label", { class: "grow" }, make("span", {}, label, make("em", {}, "one a line")), area); };
    fields.replaceChildren(list("towards", "Towards", "I love this\nWhat a wonderful day"), list("away", "Away from", "I hate this\nWhat a terrible day"), number("layer", "State behind layer", middle, layers - 1),
      make("label", {}, make("span", {}, "Strength"), make("input", { type: "number", name: "strength", min: "-100", max: "100", step: "0.5", value: "2", required: true })));
  }
}

/** What is asked of the server, and the change in words. */
function changeOf(state, kind, form) {
  const value = (name) => form.elements[name].value, layer = form.elements.layer && Number(value("layer"));
  const lines = (name) => value(name).split("\n").map((line) => line.trim()).filter(Boolean);
  if (kind === "head") return [{ heads: [{ layer, head: Number(value("head")) }] }, `Without head ${value("head")} of layer ${layer}`];
  if (kind === "layer") return [{ layers: [layer] }, `Without layer ${layer}`];
  if (kind === "steer") return [{ steer: { layer, towards: lines("towards"), away: lines("away"), strength: Number(value("strength")) } }, `Steered behind layer ${layer}, strength ${value("strength")}`];
  if (!state.word) throw new Error("choose a word first");
  // the blanks around a word stay
  const { first, last, text } = state.word, edit = { first, last, text: text.replace(/^(\s*)[^]*?(\s*)$/, (_, left, right) => left + value("text").trim() + right) };
  if (kind === "edit") return [{ edit }, `With “${value("text")}” for “${text.trim()}”`];
  return [{ patch: { layer, edit } }, `With the state behind layer ${layer} of “${value("text")}” for “${text.trim()}”`];
}

async function run(state, kind, form, note, results) {
  state.stop?.abort();
  const stop = (state.stop = new AbortController());
  let change, title;
  try { [change, title] = changeOf(state, kind, form); } catch (error) { note.textContent = error.message; return; }
  const bar = make("progress", { max: "1", "aria-label": "Progress" });
  note.replaceChildren(bar, " ", make("button", { class: "quiet bordered", type: "button", onclick: () => stop.abort() }, "Cancel"));
  delete results.dataset.done;
  const sides = { whole: state.whole ?? [], changed: [] };
  try {
    // the unchanged continuation is the same every time
    for await (const event of events(await request("inspect/change", { body: { ...state.asked, ...change, whole: state.whole === null }, signal: stop.signal }))) {
      if (event.error) throw new Error(event.error.message);
      bar.value = event.progress;
      if (!event.side) continue;
      sides[event.side].push(event);
      drawResults(state, results, title, sides);
    }
    state.whole = sides.whole;
    note.replaceChildren();
    drawResults(state, results, title, sides, true);
    results.dataset.done = "true";
  } catch (error) {
    if (state.stop === stop) note.replaceChildren(error.name === "AbortError" ? "Cancelled." : make("span", { class: "failure" }, error.message));
  }
}

/** Which tokens of two sequences belong to their longest common subsequence: two lists of booleans. */
export function common(one, two) {
  const longest = Array.from({ length: one.length + 1 }, () => new Array(two.length + 1).fill(0));
  for (let first = one.length - 1; first >= 0; first--) for (let second = two.length - 1; second >= 0; second--) longest[first][second] = one[first] === two[second] ? longest[first + 1][second + 1] + 1 : Math.max(longest[first + 1][second], longest[first][second + 1]);
  const kept = [one.map(() => false), two.map(() => false)];
  for (let first = 0, second = 0; first < one.length && second < two.length;) {
    if (one[first] === two[second]) { kept[0][first++] = kept[1][second++] = true; } else if (longest[first + 1][second] >= longest[first][second + 1]) first++;
    else second++;
  }
  return kept;
}

/** Both continuations, what differs in them marked, and what the change does to the token that came. isWhole: all is there. */
function drawResults(state, results, title, sides, isWhole = false) {
  const [same, alsoSame] = common(sides.whole.map((one) => one.id), sides.changed.map((one) => one.id));
  const text = (side, kept) => side.map((one, place) => make(kept[place] || !sides.changed.length ? "span" : "mark", { title: `${visible(one.piece)} ${percent(one.probability)}` }, one.piece));
  const column = (name, side, kept) => make("div", { class: "column" }, make("h3", {}, name), make("p", { class: "answered" }, ...text(side, kept)));
  const [whole] = sides.whole, [changed] = sides.changed, parts = [make("div", { class: "two" }, column("As it is", sides.whole, same), column(title, sides.changed, alsoSame))];
  if (changed?.watched !== null && changed) {
    const rows = [["As it is", whole], [title, changed]].map(([name, first]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "number" }, percent(first.watched)), make("td", {}, ...first.likeliest.slice(0, 3).flatMap((one) => [make("code", {}, visible(one.piece)), ` ${percent(one.probability)} `]))));
    parts.push(table("The first token of both", ["", visible(state.piece), "likeliest"], rows));
  }
  if (isWhole) {
    const differs = sides.changed.filter((_, place) => !alsoSame[place]).length;
    parts.push(make("p", { class: "soft" }, differs || sides.changed.length !== sides.whole.length ? `${differs} of ${sides.changed.length} tokens differ. Both take the likeliest token each time.` : "Nothing differs in the likeliest tokens."));
  }
  results.replaceChildren(...parts);
}
