// The guided forward pass: a token's way from the embedding through each layer to the softmax and the draw, step by step.
import { calm, events, json, make, percent, request, visible } from "./page.js";
import { drawnFrom } from "./sampled.js";
import { showDialog } from "./dialog.js";

/** Milliseconds for which a step is shown while the steps play. */
const STEP = 1100;
/** Bars of what could have come, and in the draw. */
const SHOWN = 8;

/** Show the way of a token. asked: { model, before, token }; settings: how it was sampled. */
export async function openForward(asked, piece, settings) {
  const stop = new AbortController();
  const state = { asked, piece, settings: { temperature: 1, top_p: 1, top_k: 0, min_p: 0, ...settings }, steps: [], layers: new Map(), place: 0, draw: null, playing: 0, box: null };
  const box = make("div", { class: "forward" }, make("p", { class: "soft" }, "Reading …"));
  state.box = box;
  showDialog("forward", ["How ", make("code", {}, visible(piece)), " came"], box, () => { stop.abort(); clearInterval(state.playing); });
  try {
    for await (const event of events(await request("inspect/forward", { body: asked, signal: stop.signal }))) {
      if (event.error) throw new Error(event.error.message);
      if (event.steps) begin(state, event);
      else take(state, event);
    }
    if (state.progress) state.progress.hidden = true;
    box.dataset.whole = "true";
  } catch (error) {
    if (error.name !== "AbortError") box.append(make("p", { class: "failure" }, error.message));
  }
}

function begin(state, found) {
  state.found = found;
  const draw = { name: "draw" }, softmax = { name: "softmax", sentence: found.sentence };
  state.steps = [...found.steps, softmax, draw];
  const last = state.steps.length - 1, go = (place) => () => show(state, place);
  state.slider = make("input", { type: "range", min: "0", max: String(last), value: "0", "aria-label": "Step", oninput: (event) => show(state, Number(event.target.value)) });
  state.player = make("button", { class: "strong", type: "button", onclick: () => play(state) }, "Play");
  state.counter = make("output", {});
  state.rows = drawRows(state);
  state.stage = make("div", { class: "stage" });
  state.sentence = make("p", { class: "sentence", "aria-live": "polite" });
  state.bar = make("progress", { max: "1", value: "0", "aria-label": "How far the layers are split" });
  state.progress = make("p", { class: "soft" }, state.bar, " ", make("span", {}, "splitting the layers into attention and feed-forward …"));
  state.box.replaceChildren(
    make("div", { class: "row controls" }, state.player, make("button", { class: "quiet", type: "button", "aria-label": "Step before", onclick: () => go(Math.max(0, state.place - 1))() }, "‹"), state.slider,
      make("button", { class: "quiet", type: "button", "aria-label": "Next step", onclick: () => go(Math.min(last, state.place + 1))() }, "›"), state.counter),
    make("div", { class: "way" }, state.rows, make("div", {}, state.sentence, state.stage, state.progress)));
  show(state, 0);
}

/** Play on from here, or from the beginning; pressed again, stop. */
function play(state) {
  if (state.playing) { stopPlaying(state); return; }
  const last = state.steps.length - 1;
  if (state.place === last) show(state, 0);
  state.player.textContent = "Pause";
  state.playing = setInterval(() => {
    if (state.place >= last || !state.box.isConnected) { stopPlaying(state); return; }
    show(state, state.place + 1);
  }, STEP);
}
function stopPlaying(state) { clearInterval(state.playing); state.playing = 0; state.player.textContent = "Play"; }

/** Each step as a bar of what it adds to the logit, with the probability that the token then has. */
function drawRows(state) {
  const most = Math.max(...state.steps.map((step) => Math.abs(step.part ?? 0)), 1e-9);
  return make("ol", { class: "parts", "aria-label": "Steps, and what each adds to the logit" }, ...state.steps.map((step, place) => {
    const inner = make("i", { class: step.part < 0 ? "less" : "more" });
    if (step.part !== undefined) inner.style.width = `${(50 * Math.abs(step.part)) / most}%`;
    inner.hidden = step.part === undefined;
    return make("li", {}, make("button", { type: "button", onclick: () => { stopPlaying(state); show(state, place); } },
      make("span", { class: "name" }, step.name), make("span", { class: "signed" }, inner),
      make("span", { class: "number" }, step.part === undefined ? "" : `${step.part < 0 ? "−" : "+"}${Math.abs(step.part).toFixed(2)}`),
      make("span", { class: "number" }, step.probability === undefined ? "" : percent(step.probability))));
  }));
}

/** Write the sentence of a step; no line ends before a percent sign. */
function tell(state, text) { state.sentence.textContent = text.replace(/(\d) %/g, "$1\u00a0%"); }

function show(state, place) {
  state.place = place;
  state.slider.value = String(place);
  state.counter.textContent = `${place + 1} / ${state.steps.length}`;
  [...state.rows.children].forEach((row, number) => {
    row.classList.toggle("to-come", number > place);
    const button = row.firstChild;
    if (number === place) button.setAttribute("aria-current", "step");
    else button.removeAttribute("aria-current");
  });
  // only the list scrolls: the page would move under the pointer
  const row = state.rows.children[place];
  if (row.offsetTop < state.rows.scrollTop || row.offsetTop + row.offsetHeight > state.rows.scrollTop + state.rows.clientHeight) state.rows.scrollTop = row.offsetTop - state.rows.clientHeight / 2;
  const step = state.steps[place];
  state.box.dataset.step = step.name;
  if (step.name === "draw") drawDraw(state);
  else if (step.name === "softmax") { tell(state, step.sentence); drawBars(state, "What could come", state.found.alternatives.slice(0, SHOWN)); }
  else drawLayer(state, step, place - 1);
}

/** A step's likeliest tokens, and where it is a layer that has been split, its parts. */
function drawLayer(state, step, layer) {
  const parts = state.layers.get(layer);
  tell(state, step.sentence + (parts ? ` ${parts.sentence}` : ""));
  drawBars(state, layer < 0 ? "What the embedding alone would say" : "What would come if the model ended here", step.likeliest);
  if (!parts) return;
  const most = Math.max(Math.abs(parts.attention), Math.abs(parts.feed_forward), ...parts.heads.map(Math.abs), 1e-9);
  const bar = (name, value, strong) => {
    const inner = make("i", { class: value < 0 ? "less" : "more" });
    inner.style.width = `${(50 * Math.abs(value)) / most}%`;
    return make("li", { class: strong ? "strongest" : undefined }, make("span", { class: "name" }, name), make("span", { class: "signed" }, inner), make("span", { class: "number" }, `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`));
  };
  state.stage.append(make("h3", {}, "What it adds to the logit"), make("ul", { class: "split", tabindex: "0", "aria-label": "Parts of the layer" }, bar("attention", parts.attention), bar("feed-forward", parts.feed_forward), ...parts.heads.map((value, head) => bar(`head ${head}`, value, head === parts.strongest))));
  if (parts.looks.length) state.stage.append(make("h3", {}, `Where head ${parts.strongest} looks`), make("p", { class: "soft" }, ...parts.looks.flatMap((one, number) => [number ? ", " : "", make("code", {}, visible(one.piece)), ` ${percent(one.weight)}`])));
}

function drawBars(state, title, likeliest) {
  const most = Math.max(...likeliest.map((one) => one.probability), 1e-9);
  const rows = likeliest.map((one) => {
    const inner = make("i", {});
    inner.style.width = `${(100 * one.probability) / most}%`;
    return make("li", { class: one.id === state.asked.token ? "same" : undefined }, make("code", {}, visible(one.piece)), make("span", { class: "bar" }, inner), make("span", { class: "number" }, percent(one.probability)));
  });
  state.stage.replaceChildren(make("h3", {}, title), make("ul", { class: "likeliest" }, ...rows));
}

/** The draw: the sliders are live, and a number between 0 and 1 falls into the part of the token that it draws. */
function drawDraw(state) {
  const slider = (name, label, least, most, step) => {
    const output = make("output", {}, String(state.settings[name]));
    return make("label", {}, make("span", {}, label, " ", output), make("input", { type: "range", "aria-label": label, min: String(least), max: String(most), step: String(step), value: String(state.settings[name]), oninput: (event) => { state.settings[name] = Number(event.target.value); output.textContent = event.target.value; state.draw = state.exact = null; drawShares(state, shares); } }));
  };
  const shares = make("div", {});
  state.exact = null;
  state.stage.replaceChildren(
    make("div", { class: "sliders" }, slider("temperature", "Temperature", 0, 2, 0.05), slider("top_p", "Top p", 0.05, 1, 0.05), slider("top_k", "Top k", 0, 100, 1), slider("min_p", "Min p", 0, 0.5, 0.01)),
    shares);
  drawShares(state, shares);
}

function drawShares(state, place) {
  const { alternatives } = state.found, { token } = state.asked;
  const own = state.exact ?? drawnFrom({ alternatives }, state.settings), name = `“${visible(state.piece)}”`;
  const at = `At temperature ${state.settings.temperature}`;
  if (!own) { tell(state, `${at} …`); place.replaceChildren(); exactShares(state, place); return; }
  const share = own.shares.get(token) ?? 0, kept = own.kept === null ? state.found.vocabulary : own.kept;
  // what the likeliest leave over is of all others together
  const all = alternatives.some((one) => one.id === token) ? alternatives : [...alternatives, { id: token, piece: state.piece }];
  const listed = all.filter((one) => own.shares.get(one.id)).map((one) => ({ ...one, share: own.shares.get(one.id) }));
  const rest = Math.max(0, 1 - listed.reduce((sum, one) => sum + one.share, 0));
  const segments = [...listed, ...(rest > 1e-6 ? [{ id: null, piece: "", share: rest }] : [])];
  let drawn = null;
  if (state.draw !== null) {
    let reached = 0;
    drawn = segments.find((one) => (reached += one.share) >= state.draw) ?? segments.at(-1);
  }
  const said = state.draw === null ? "" : ` The number ${state.draw.toFixed(3)} draws ${drawn.id === null ? "one of the others" : `“${visible(drawn.piece)}”`}.`;
  tell(state, `${at} ${kept === 1 ? "one token" : `${kept.toLocaleString("en")} tokens`} may be drawn, and ${name} ${share ? `has ${percent(share)}` : "is not among them"}.${said}`);
  const strip = make("div", { class: "draw", role: "img", "aria-label": `Shares of the tokens that may be drawn; ${name} has ${percent(share)}` }, ...segments.map((one) => {
    const part = make("span", { class: one.id === token ? "same" : one.id === null ? "others" : undefined, title: `${one.id === null ? "all others" : visible(one.piece)} ${percent(one.share)}` }, one.share > 0.08 ? (one.id === null ? "others" : visible(one.piece)) : "");
    part.style.flexGrow = String(one.share);
    return part;
  }));
  const mark = make("i", { class: "mark" });
  mark.style.left = `${100 * (state.draw ?? 0)}%`;
  mark.hidden = state.draw === null;
  place.replaceChildren(make("div", { class: "draw-box" }, strip, mark), make("button", { class: "quiet bordered", type: "button", onclick: () => { state.draw = Math.random(); drawShares(state, place); place.querySelector("button").focus(); } }, "Draw"));
}

/** What is drawn from where the likeliest do not decide it: the server knows all tokens. */
const exactShares = calm(120, async (state, place) => {
  const asked = { ...state.settings }, { temperature, top_p, top_k, min_p } = asked;
  try {
    const found = await json("inspect/token", { body: { ...state.asked, temperature, top_p, top_k: top_k || 0, min_p: min_p || 0 } });
    if (!place.isConnected || Object.keys(asked).some((name) => asked[name] !== state.settings[name])) return;
    state.exact = { shares: new Map([...found.alternatives, found.token].map((one) => [one.id, one.sampled])), kept: found.kept };
    drawShares(state, place);
  } catch (error) {
    place.replaceChildren(make("p", { class: "failure" }, error.message));
  }
});

/** What the copy of the model says: how far it is, and the parts of a layer. */
function take(state, event) {
  if (event.note) { state.progress.replaceChildren(`The layers are not split: ${event.note}.`); state.progress = null; return; }
  state.bar.value = event.progress;
  if (event.layer === undefined) return;
  state.layers.set(event.layer, event);
  if (state.place - 1 === event.layer && state.steps[state.place].part !== undefined) show(state, state.place);
}
