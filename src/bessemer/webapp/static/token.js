// This token: what else could have come, what sampling makes of it, what each layer would have said, and where a head looks.
import { byId, calm, given, json, make, nameOfBlank, percent, visible } from "./page.js";

const side = byId("side");
let open = null;

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

/** Show an answer in its tokens; `goOn(node, place, id, beginning)` makes a branch from another one. Pressed again, as it was. */
export async function openTokens(entry, goOn) {
  const again = open?.entry === entry;
  closeToken();
  if (again) return;
  const pieces = await piecesOf(entry.node.settings.model, entry.node.ids);
  const strip = make("div", { class: "tokens pressable", role: "group", "aria-label": "Tokens of the answer" },
    ...pieces.map((piece, place) => make("button", { type: "button", class: `t${place % 5}`, "aria-label": nameOfBlank(piece), onclick: () => choose(place) }, piece.includes("\n") ? `${visible(piece)}\n` : piece || "∅")));
  entry.text.hidden = true;
  entry.text.after(strip);
  open = { entry, strip, pieces, goOn, place: 0, head: null, settings: { temperature: 1, top_p: 1, top_k: 0, ...entry.node.settings } };
  choose(0);
}

function choose(place) {
  open.place = place;
  open.strip.querySelector("[aria-current]")?.removeAttribute("aria-current");
  open.strip.children[place].setAttribute("aria-current", "true");
  load();
}

const load = calm(60, async () => {
  if (!open) return;
  const { entry, place, settings, head } = open, asked = open, node = entry.node;
  side.hidden = false;
  document.body.classList.add("with-side");
  const body = {
    model: node.settings.model, before: [...node.promptIds, ...node.ids.slice(0, place)], token: node.ids[place], attention: head,
    temperature: settings.temperature, top_p: settings.top_p, top_k: settings.top_k || 0,
  };
  try {
    const found = await json("inspect/token", { body });
    if (open !== asked || open.place !== place) return;
    // a slider that is held stays where it is
    if (side.contains(document.activeElement) && side.dataset.place === String(place) && document.activeElement.type === "range") drawNumbers(found);
    else await draw(found);
  } catch (error) {
    side.replaceChildren(top(), make("p", { class: "failure" }, error.message));
  }
});

const top = () => make("div", { class: "row" }, make("h2", {}, "This token"), make("span", { class: "space" }), make("button", { class: "quiet", type: "button", onclick: closeToken, "aria-label": "Close" }, "×"));

async function draw(found) {
  side.dataset.place = String(open.place);
  const slider = (name, label, most, step) => {
    const output = make("output", {}, String(open.settings[name] ?? 0));
    return make("label", {}, make("span", {}, label, " ", output), make("input", {
      type: "range", min: name === "top_p" ? "0.05" : "0", max: String(most), step: String(step), value: String(open.settings[name] ?? 0),
      oninput: (event) => { open.settings[name] = Number(event.target.value); output.textContent = event.target.value; load(); },
    }));
  };
  side.replaceChildren(
    top(), make("div", { id: "token-numbers" }),
    make("div", { class: "sliders" }, slider("temperature", "Temperature", 2, 0.05), slider("top_p", "Top p", 1, 0.05), slider("top_k", "Top k", 100, 1)),
    make("div", { id: "token-alternatives" }), make("div", { id: "token-lens" }), make("div", { id: "token-attention" }), make("div", { id: "token-experts" }), make("div", { id: "token-lineage" }),
  );
  drawNumbers(found);
  drawLens(found);
  await drawAttention(found);
  drawExperts(found);
  drawLineage();
}

function drawNumbers(found) {
  const { token } = found, fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
  byId("token-numbers").replaceChildren(make("p", { class: "chosen" }, make("code", {}, visible(token.piece)), ` id ${token.id}, token ${open.place + 1} of ${open.pieces.length}`),
    make("dl", { class: "facts" }, fact("probability", percent(token.probability)), fact("rank", token.rank.toLocaleString("en")),
      fact("entropy", `${found.entropy_bits.toFixed(2)} bits`), fact("may be drawn", `${found.kept.toLocaleString("en")} of ${found.vocabulary.toLocaleString("en")}`)));
  const most = Math.max(...found.alternatives.map((one) => Math.max(one.probability, one.sampled)), 1e-9);
  const bar = (share, kind) => { const inner = make("i", { class: kind }); inner.style.width = `${(100 * share) / most}%`; inner.hidden = !share; return make("span", { class: "bar" }, inner); };
  const rows = found.alternatives.map((one) => make("li", {}, make("button", {
    type: "button", class: one.id === token.id ? "same" : undefined, disabled: one.id === token.id, title: one.id === token.id ? "The token that came" : "Go on from here with this one",
    onclick: () => { const { entry, goOn, place, pieces } = open; closeToken(); goOn(entry.node, place, one.id, pieces.slice(0, place).join("") + one.piece); },
  }, make("code", {}, visible(one.piece)), make("span", { class: "two-bars" }, bar(one.probability, "model"), bar(one.sampled, "sampled")), make("span", { class: "number" }, percent(one.probability), make("br"), one.sampled ? percent(one.sampled) : "–"))));
  byId("token-alternatives").replaceChildren(make("h3", {}, "What could have come"), make("p", { class: "soft" }, "Above the model's own probability, below what is drawn from at these settings. Press one to go on from it."), make("ol", { class: "alternatives" }, ...rows));
}

function drawLens(found) {
  const rows = [...found.lens].reverse().map((row) => make("tr", {}, make("td", {}, row.after),
    make("td", {}, ...row.likeliest.flatMap((one) => [make("code", { title: percent(one.probability) }, visible(one.piece)), " "])),
    make("td", { class: "number" }, percent(row.probability)), make("td", { class: "number" }, row.rank.toLocaleString("en"))));
  byId("token-lens").replaceChildren(make("h3", {}, "Layer by layer"), make("p", { class: "soft" }, "What would come if the model ended there (the logit lens), and how likely and which in rank the token was."),
    make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...["after", "likeliest", "token", "rank"].map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows))));
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
    const { node } = open.entry, pieces = await piecesOf(node.settings.model, [...node.promptIds, ...node.ids.slice(0, open.place)]);
    const most = Math.max(...found.attention, 1e-9);
    parts.push(make("p", { class: "looked-at" }, ...pieces.map((piece, place) => {
      const span = make("span", { title: percent(found.attention[place] ?? 0) }, piece || "∅");
      span.style.backgroundColor = `color-mix(in oklab, var(--heat) ${Math.round((75 * (found.attention[place] ?? 0)) / most)}%, transparent)`;
      return span;
    })));
  }
  byId("token-attention").replaceChildren(...parts);
}

/** Sections that are asked for by a press, since they read models and documents. */
function drawLineage() {
  const { model } = open.entry.node.settings;
  // nothing is known here of a model beside the first
  if (!given.run || !given.made.includes(model)) { byId("token-lineage").replaceChildren(); return; }
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
  return [make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...["model", "likeliest", "token", "rank"].map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows)))];
}

function drawTraining({ run, stage, passages, looked_at, documents }) {
  const looked = looked_at < documents ? `${looked_at.toLocaleString("en")} of ${documents.toLocaleString("en")}` : `all ${documents.toLocaleString("en")}`;
  const head = make("p", { class: "soft" }, passages.length ? `The longest sequence that ends here, in ${looked} training documents of ${stage}.` : `Not two tokens that end here stand in ${looked} training documents of ${stage}.`);
  return [head, ...passages.map((one) => make("div", { class: "passage" },
    make("p", {}, one.left, make("mark", {}, one.found), one.right),
    make("p", { class: "soft" }, one.url ?? one.source, " · ", make("a", { href: `data?${new URLSearchParams({ run, stage, id: one.id })}` }, "what the filters said")),
    make("details", {}, make("summary", {}, "scores"), make("p", { class: "soft" }, Object.entries(one.scores).map(([name, value]) => `${name.replaceAll("_", " ")} ${Number(Number(value).toPrecision(3))}`).join(" · ")))))];
}

function drawExperts(found) {
  if (!found.experts.length) return;
  const rows = found.experts.map(({ layer, experts, weights }) => make("tr", {}, make("td", {}, `layer ${layer}`), make("td", {}, experts.map((expert, place) => `${expert} (${percent(weights[place])})`).join(", "))));
  byId("token-experts").replaceChildren(make("h3", {}, "Experts"), make("table", {}, make("tbody", {}, ...rows)));
}
