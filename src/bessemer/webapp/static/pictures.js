// Pictures of a question: pasted, dropped, chosen or taken with a camera, made no larger than the model reads them, and shown.
import { byId, json, make, say } from "./page.js";
import { models } from "./settings.js";

/** Bytes of a picture that is kept and sent: sixteen of them fit into the body of a request. */
const MOST_BYTES = 360 << 10;
/** Pixels that are decoded here; whatever has more is for the server to say. */
const MOST_PIXELS = 64e6;
/** A picture is not made smaller than this: people look at it too. Nor is it kept larger than that. */
const LEAST_SIDE = 512, MOST_SIDE = 4096;
/** Pictures of one question, and bytes of a file. */
const MOST = 32, MOST_FILE = 64 << 20;

const list = byId("pictures"), note = byId("picture-note");
/** Pictures that wait for their question: { data, alt, width, height }. */
let waiting = [];
let reading = 0;
let working = Promise.resolve();

export const isPicture = (file) => file.type.startsWith("image/");
/** How many wait for their question, those included that are being read. */
export const count = () => waiting.length + reading;
export const isReading = () => reading > 0;

/** The pictures that wait; they are taken out of the composer. */
export function take() {
  const taken = waiting;
  waiting = [];
  draw(() => {});
  tell("");
  return taken;
}

/** Add files. model: by whose size they are made smaller; changed: called whenever there are more or fewer. */
export function add(files, model, changed) {
  tell("");
  if (files.length + count() > MOST) { tell(`at most ${MOST} pictures are of one question`); return; }
  for (const file of files) {
    reading += 1;
    working = working.then(() => prepared(file, model)).then((one) => { waiting.push(one); say(`${file.name || "the picture"} is added`); }, (error) => tell(`${file.name ? `${file.name}: ` : ""}${error.message}`))
      .then(() => { reading -= 1; draw(changed); changed(); });
  }
  draw(changed);
  changed();
}

function tell(text) {
  note.textContent = text;
  note.hidden = !text;
}

/** Say below the pictures why a question cannot be sent; null: it can. */
export function warn(text) {
  const place = byId("picture-warning");
  place.hidden = !text;
  if (place.textContent !== (text ?? "")) place.textContent = text ?? "";
}

function draw(changed) {
  list.hidden = !count();
  list.replaceChildren(...waiting.map((one, place) => make("li", {}, picture(one, place),
    make("input", { "aria-label": `Alt text of picture ${place + 1}`, placeholder: "alt text", value: one.alt, maxlength: "500", oninput: (event) => { one.alt = event.target.value; } }),
    make("button", { class: "quiet", type: "button", title: "Remove", "aria-label": `Remove picture ${place + 1}`, onclick: () => { waiting = waiting.filter((other) => other !== one); draw(changed); changed(); byId("prompt").focus(); } }, "×"))),
  ...(reading ? [make("li", { class: "soft" }, "reading …")] : []));
}

/** A picture as an element; place: among the others. */
export function picture(one, place) {
  return make("img", { src: one.data, alt: one.alt || `Picture ${place + 1}`, width: one.width ? String(one.width) : undefined, height: one.height ? String(one.height) : undefined });
}

/** The pictures of a question as elements; removed: called with the others when one is taken out, null: none can be. */
export function pictures(images, removed = null) {
  return make("div", { class: "pictures" }, ...images.map((one, place) => (removed ? make("span", { class: "removable" }, picture(one, place),
    make("button", { class: "quiet", type: "button", title: "Remove", "aria-label": `Remove picture ${place + 1}`, onclick: () => removed(images.filter((other) => other !== one)) }, "×")) : picture(one, place))));
}

// --- what a model reads -------------------------------------------------------------------------------------------------

/** Why a question cannot be sent to some models, of which one reads no pictures; null: it can. asks: whether pictures wait;
 *  has: whether the conversation has some. */
export function blindness(names, asks, has) {
  const blind = (asks || has) && names.find((name) => models.find((one) => one.id === name)?.input_modalities?.includes("image") === false);
  if (!blind) return null;
  return asks ? `${blind} reads no pictures: take them out, or choose a model that does.` : `${blind} reads no pictures, and this conversation has some: choose a model that does, or begin a new conversation.`;
}

// --- from a file to what is sent ------------------------------------------------------------------------------------------

const dataUri = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Error("the file cannot be read"));
  reader.readAsDataURL(blob);
});

/** A file as it is sent: drawn anew, so that nothing but its pixels is left, upright and without what cameras write beside them. What
 *  this browser cannot draw whole is shown to the server, which says in a line what is wrong with it. */
async function prepared(file, model) {
  if (file.size > MOST_FILE) throw new Error(`it has ${Math.round(file.size / (1 << 20))} MiB; at most ${MOST_FILE >> 20} MiB are read`);
  const alt = (file.name ?? "").replace(/\.\w+$/, ""), uri = await dataUri(file), image = new Image();
  image.src = uri;
  const isDrawn = await isWhole(file) && await new Promise((resolve) => { image.onload = () => resolve(image.naturalWidth > 0); image.onerror = () => resolve(false); if (image.complete) resolve(image.naturalWidth > 0); })
    && image.naturalWidth * image.naturalHeight <= MOST_PIXELS && await image.decode().then(() => true, () => false);
  if (!isDrawn) {
    await askServer(uri, model);
    return { data: uri, alt };
  }
  const size = models.find((one) => one.id === model)?.image_size ?? {};
  let share = Math.min(1, scale(image, size));
  for (;;) {
    const canvas = drawn(image, share);
    for (const [kind, quality] of [["image/png"], ["image/jpeg", 0.92], ["image/jpeg", 0.8]]) {
      const blob = await new Promise((resolve) => canvas.toBlob(resolve, kind, quality));
      if (blob && blob.size <= MOST_BYTES) return { data: await dataUri(blob), alt, width: canvas.width, height: canvas.height };
    }
    share *= 0.75;
  }
}

/** How much smaller a picture is made for a model, whose larger ones are made smaller to a longest or a shortest edge. */
function scale({ naturalWidth: width, naturalHeight: height }, { longest_edge: longest = null, shortest_edge: shortest = null }) {
  const most = Math.min(1, MOST_SIDE / Math.max(width, height));
  const useful = longest ? longest / Math.max(width, height) : shortest ? shortest / Math.min(width, height) : 1;
  return Math.min(most, Math.max(useful, LEAST_SIDE / Math.max(width, height)));
}

function drawn(image, share) {
  const canvas = make("canvas");
  canvas.width = Math.max(1, Math.round(share * image.naturalWidth));
  canvas.height = Math.max(1, Math.round(share * image.naturalHeight));
  const context = canvas.getContext("2d");
  // what is transparent is white, as the server has it
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/** Whether a file has its end; browsers draw what there is of one that was cut off. */
async function isWhole(file) {
  const bytes = new Uint8Array(await file.slice(-4096).arrayBuffer()), ends = { "image/png": [0x49, 0x45, 0x4e, 0x44], "image/jpeg": [0xff, 0xd9] }[file.type];
  return !ends || bytes.some((_, place) => ends.every((byte, index) => bytes[place + index] === byte));
}

/** Raises an error with the server's line about a picture that it refuses. */
async function askServer(uri, model) {
  const data = uri.slice(uri.indexOf(",") + 1), said = uri.slice("data:".length, uri.indexOf(";"));
  // the server looks at the bytes, and the form of the request has names of four kinds alone
  const media_type = ["image/png", "image/jpeg", "image/webp", "image/gif"].includes(said) ? said : "image/png";
  await json("v1/messages/count_tokens", { body: { model, messages: [{ role: "user", content: [{ type: "image", source: { type: "base64", media_type, data } }] }] } });
}

// --- a conversation's ---------------------------------------------------------------------------------------------------

/** The pictures of a message in a file, those that are pictures; undefined: none. */
export function checkedImages(images) {
  if (!Array.isArray(images)) return undefined;
  const known = images.filter((one) => typeof one?.data === "string" && /^data:image\/[\w.+-]{1,64};base64,[A-Za-z0-9+/]+=*$/.test(one.data)).slice(0, MOST);
  const side = (value) => (Number.isInteger(value) && value > 0 && value <= MOST_SIDE ? value : undefined);
  return known.length ? known.map(({ data, alt, width, height }) => ({ data, alt: String(alt ?? "").slice(0, 500), width: side(width), height: side(height) })) : undefined;
}
