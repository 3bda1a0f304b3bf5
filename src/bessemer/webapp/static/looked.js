// What a token looked at: its attention over the patches of each picture of its prompt, as a heat map, and the logit lens at a patch.
import { json, make, percent, promptly, table, visible } from "./page.js";

const SVG = "http://www.w3.org/2000/svg";
/** Width and height of a picture in the units of its heat map. */
const UNITS = 1000;
function shape(name, attributes, data = {}) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  Object.assign(node.dataset, data);
  return node;
}

/** The section of a token. asked: { model, before, token, images }; images: { data, alt } of each. view: { layer, head, whole } that
 *  stay while another token is chosen. isOver: whether another one was chosen meanwhile. Returns what shows a token of the prompt. */
export async function drawLooked(box, asked, images, view, isOver) {
  const again = (changes) => { Object.assign(view, changes); drawLooked(box, asked, images, view, isOver).catch((error) => { if (!isOver()) box.append(make("p", { class: "failure" }, error.message)); }); };
  const found = await json("inspect/pictures", { body: { ...asked, layer: view.layer, head: view.head } });
  if (isOver()) return;
  const reading = make("p", { class: "reading soft" }), lens = make("div", { class: "patch-lens" });
  const all = found.pictures.reduce((sum, one) => sum + one.share, 0), named = found.pictures.length > 1 ? "the pictures" : "the picture";
  const choice = (name, mean, count, disabled) => {
    const select = make("select", { "aria-label": `Attention by ${name}`, disabled }, make("option", { value: "" }, mean), ...Array.from({ length: count }, (_, number) => make("option", { value: String(number) }, `${name} ${number}`)));
    select.value = String(view[name] ?? "");
    select.addEventListener("change", () => again({ [name]: select.value === "" ? null : Number(select.value), ...(name === "layer" && select.value === "" ? { head: null } : {}) }));
    return select;
  };
  const strongest = found.strongest.slice(0, 3).map(({ layer, head, share }) => make("button", { class: "quiet bordered", type: "button", title: "Show this head", onclick: () => again({ layer, head }) }, `layer ${layer}, head ${head}: ${percent(share)}`));
  const figures = found.pictures.map((one, place) => drawPicture(one, place, images[place], found, view, again, reading, show));
  const loadLens = promptly(80, async (position) => {
    try {
      const answer = await json("inspect/patch", { body: { ...asked, position } });
      if (isOver() || box.dataset.token !== String(position)) return;
      lens.replaceChildren(...drawLens(answer, position));
      lens.dataset.token = String(position);
    } catch (error) {
      if (!isOver()) lens.replaceChildren(make("p", { class: "failure" }, error.message));
    }
  });
  function show(position) {
    box.dataset.token = String(position);
    for (const rect of box.querySelectorAll("rect.chosen")) rect.classList.remove("chosen");
    for (const rect of box.querySelectorAll(`rect[data-token="${position}"]`)) rect.classList.add("chosen");
    loadLens(position);
  }
  box.replaceChildren(make("h3", {}, "What it looked at"),
    make("p", { class: "soft" }, `${percent(all)} of the attention is on ${named}, the rest on words. The patch with the most has the whole colour; choose one.`),
    make("div", { class: "row" }, choice("layer", "mean of all layers", found.layers, false), choice("head", "mean of all heads", found.heads, view.layer === null)),
    make("p", { class: "row strongest-heads soft" }, `Looking at ${named} most:`, ...strongest), ...figures, reading, lens);
  delete box.dataset.token;
  box.dataset.layer = String(view.layer ?? "");
  box.dataset.head = String(view.head ?? "");
  if (view.patch !== null && view.patch !== undefined && found.pictures.some((one) => view.patch >= one.start && view.patch < one.end)) show(view.patch);
  return (position) => {
    if (!box.querySelector(`rect[data-token="${position}"]`)) { again({ whole: !view.whole, patch: position }); return; }
    view.patch = position;
    show(position);
    box.scrollIntoView({ block: "nearest" });
  };
}

/** One picture with its heat map. show: chooses a token. */
function drawPicture(one, place, image, found, view, again, reading, show) {
  const isCut = one.tiles.length > 1, shown = one.tiles.filter((tile) => !isCut || (tile.row === null) === Boolean(view.whole));
  const cells = cellsOf(shown), most = Math.max(...cells.map((cell) => cell.weight), 1e-9);
  const svg = shape("svg", { viewBox: `0 0 ${UNITS} ${UNITS}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  for (const cell of cells) svg.append(shape("rect", { x: UNITS * cell.x, y: UNITS * cell.y, width: UNITS * cell.width, height: UNITS * cell.height, "fill-opacity": (0.75 * cell.weight / most).toFixed(4) }, { token: String(cell.token), weight: String(cell.weight) }));
  const columns = Math.max(...cells.map((cell) => cell.column)) + 1, rows = cells.length / columns;
  const inOrder = [...cells].sort((first, second) => first.row - second.row || first.column - second.column);
  const words = (cell) => `${cell.tile.row === null ? "" : `tile ${cell.tile.row + 1}, ${cell.tile.column + 1}: `}row ${cell.row + 1}, column ${cell.column + 1} of ${rows} × ${columns}: ${percent(cell.weight)} of the attention; token ${cell.token} of the prompt`;
  const heat = make("div", { class: "heat", tabindex: "0", role: "slider", "aria-label": `Patches of picture ${place + 1}`, "aria-valuemin": "0", "aria-valuemax": String(cells.length - 1), "aria-valuenow": "0", "aria-valuetext": words(inOrder[0]) },
    make("img", { src: image.data, alt: image.alt || `Picture ${place + 1}`, draggable: "false" }), svg);
  const choose = (cell) => {
    heat.setAttribute("aria-valuenow", String(inOrder.indexOf(cell)));
    heat.setAttribute("aria-valuetext", words(cell));
    reading.textContent = sentence(words(cell));
    view.patch = cell.token;
    show(cell.token);
  };
  const cellAt = (event) => cells[[...svg.children].indexOf(event.target)];
  svg.addEventListener("pointermove", (event) => { const cell = cellAt(event); if (cell) reading.textContent = sentence(words(cell)); });
  svg.addEventListener("click", (event) => { const cell = cellAt(event); if (cell) choose(cell); });
  heat.addEventListener("keydown", (event) => {
    const now = Number(heat.getAttribute("aria-valuenow"));
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, ArrowUp: now - columns, ArrowDown: now + columns, Home: 0, End: cells.length - 1, Enter: now }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    choose(inOrder[Math.max(0, Math.min(cells.length - 1, to))]);
  });
  const ways = isCut && make("div", { class: "row" }, ...[false, true].map((whole) => make("button", { class: "quiet", type: "button", "aria-pressed": String(Boolean(view.whole) === whole), onclick: () => again({ whole }) },
    `${whole ? "the whole, made small" : `${one.tiles.length - 1} tiles`}: ${percent(one.tiles.filter((tile) => (tile.row === null) === whole).reduce((sum, tile) => sum + tile.share, 0))}`)));
  return make("figure", { class: "looked" }, heat, make("figcaption", { class: "soft" }, `Picture ${place + 1}: ${percent(one.share)} of the attention, tokens ${one.start} to ${one.end - 1} of the prompt`), ways);
}

const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}.`;

/** The tokens of parts as cells: where in the picture, in which row and column of all, and the weight. */
function cellsOf(tiles) {
  return tiles.flatMap((tile) => {
    const [left, top, right, bottom] = tile.box, rows = tile.token_rows, columns = tile.token_columns, width = (right - left) / columns, height = (bottom - top) / rows;
    return tile.weights.map((weight, number) => {
      const row = Math.floor(number / columns), column = number % columns;
      return { tile, weight, token: tile.first + number, x: left + column * width, y: top + row * height, width, height, row: row + rows * (tile.row ?? 0), column: column + columns * (tile.column ?? 0) };
    });
  });
}

function drawLens(answer, position) {
  const rows = [...answer.lens].reverse().map((row) => make("tr", {}, make("td", {}, row.after),
    make("td", {}, ...row.likeliest.flatMap((one) => [make("code", { title: percent(one.probability) }, visible(one.piece)), " "])),
    ...("probability" in row ? [make("td", { class: "number" }, percent(row.probability)), make("td", { class: "number" }, row.rank.toLocaleString("en"))] : [])));
  const heads = ["after", "likeliest", ...("probability" in answer.lens[0] ? ["token", "rank"] : [])];
  return [make("h4", {}, `Behind token ${position}, layer by layer`), make("p", { class: "soft" }, "What would come if the text ended at this patch, and the model at that layer (the logit lens), and how likely the chosen token is there."),
    table("Layer by layer behind the patch", heads, rows)];
}
