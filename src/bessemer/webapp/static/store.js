// Conversations, kept in this browser alone (IndexedDB). A conversation is a tree of messages: `leaf` is the end of the branch shown.
// A question's pictures, `images`, are in it as data URIs. Several tabs may change one: what is written is merged with what lies there, message by message, and the other tabs are told.

const NAME = "bessemer", STORE = "conversations";
const others = new BroadcastChannel(NAME);

function opened() {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

async function run(mode, work) {
  const database = await opened();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const asked = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(asked.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

export const all = () => run("readonly", (store) => store.getAll());
export const get = (id) => run("readonly", (store) => store.get(id));

/** Write a conversation, and take over what other tabs have written of it. Resolves to whether that was anything. */
export async function put(conversation) {
  // as it is now: it may change while the transaction waits
  const mine = structuredClone(conversation);
  await run("readwrite", (store) => {
    const asked = store.get(mine.id);
    asked.onsuccess = () => { if (asked.result) takeOver(mine, asked.result); store.put(mine); };
    return asked;
  });
  others.postMessage(mine.id);
  return takeOver(conversation, mine);
}

export async function remove(id) {
  await run("readwrite", (store) => store.delete(id));
  others.postMessage(id);
}

/** Call `work` with the id of a conversation that another tab has written or removed. */
export function onOthers(work) { others.onmessage = (event) => work(event.data); }

/** Note that a message, or the name or the system message of a conversation, is another one: of two tabs' the later stays. */
export function touch(part) { part.changed = Date.now(); }

const changed = (part) => part.changed ?? part.at ?? 0;

/** Take from another copy of a conversation the messages that are not here or were changed later, and the name and the system
 *  message where these were. Returns whether there was anything. */
export function takeOver(conversation, other) {
  let isNews = false;
  for (const [id, node] of Object.entries(other.nodes)) {
    const own = conversation.nodes[id];
    if (own && changed(node) <= changed(own)) continue;
    if (own) Object.assign(own, node);
    else conversation.nodes[id] = node;
    isNews = true;
  }
  if (changed(other) > changed(conversation)) {
    conversation.title = other.title;
    conversation.system = other.system;
    conversation.documents = other.documents;
    conversation.changed = other.changed;
    isNews = true;
  }
  conversation.updated = Math.max(conversation.updated, other.updated);
  return isNews;
}

export const newId = () => crypto.randomUUID?.() ?? `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;

export function newConversation() {
  const now = Date.now();
  return { format: 1, id: newId(), title: "", created: now, updated: now, system: "", nodes: {}, leaf: null };
}

export function addNode(conversation, parent, role, content = "") {
  const node = { id: newId(), parent, role, content, at: Date.now() };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  return node;
}

/** The messages from the first to a node. */
export function pathTo(conversation, id) {
  const path = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent]) path.push(node);
  return path.reverse();
}

/** The conversation up to a message, as a model reads it: without answers that never came. Questions without an answer are one with
 *  the next, since templates want the two sides in turn. */
export function messagesTo(conversation, id) {
  const said = [];
  for (const { role, content, images } of pathTo(conversation, id)) {
    if (role === "assistant" && !content.trim()) continue;
    const whole = images?.length ? [...images.map(({ data }) => ({ type: "image_url", image_url: { url: data } })), ...partsOf(content)] : content;
    if (said.at(-1)?.role !== role) said.push({ role, content: whole });
    else if (typeof whole === "string" && typeof said.at(-1).content === "string") said.at(-1).content += `\n\n${whole}`;
    else said.at(-1).content = [...partsOf(said.at(-1).content), ...partsOf("\n\n"), ...partsOf(whole)];
  }
  return conversation.system ? [{ role: "system", content: conversation.system }, ...said] : said;
}

const partsOf = (content) => (typeof content === "string" ? (content ? [{ type: "text", text: content }] : []) : content);

/** The pictures of the conversation before an answer, as the model read them: without those of turns that no longer fitted. */
export function imagesBefore(conversation, node) {
  const asked = pathTo(conversation, node.parent), sent = messagesTo(conversation, node.parent).filter((one) => one.role !== "system").slice(node.left ?? 0);
  const wanted = sent.flatMap(({ content }) => (typeof content === "string" ? [] : content.filter((part) => part.type === "image_url"))).length;
  return wanted ? asked.flatMap(({ images }) => images ?? []).slice(-wanted) : [];
}

/** Messages that answer the same one, oldest first. */
export function siblings(conversation, node) {
  return Object.values(conversation.nodes).filter((other) => other.parent === node.parent).sort((one, two) => one.at - two.at);
}

/** Show the branch through a node, down to its newest end. */
export function showBranch(conversation, id) {
  let end = id;
  for (;;) {
    const next = Object.values(conversation.nodes).filter((node) => node.parent === end).sort((one, two) => two.at - one.at)[0];
    if (!next) break;
    end = next.id;
  }
  conversation.leaf = end;
}

/** A conversation from a file, or null: what is not one, or has a hole in its tree. checkedImages: gives what of a message's pictures
 *  are pictures. */
export function checked(value, checkedImages) {
  if (typeof value !== "object" || value === null || value.format !== 1 || typeof value.nodes !== "object" || value.nodes === null) return null;
  const nodes = {};
  for (const node of Object.values(value.nodes)) {
    if (typeof node?.id !== "string" || !["user", "assistant"].includes(node.role) || typeof node.content !== "string") return null;
    if (node.parent !== null && typeof value.nodes[node.parent] !== "object") return null;
    nodes[node.id] = { ...node, images: node.role === "user" ? checkedImages(node.images) : undefined, at: Number(node.at) || 0 };
  }
  for (const node of Object.values(nodes)) {
    const seen = new Set();
    for (let up = node; up; up = nodes[up.parent]) { if (seen.has(up.id)) return null; seen.add(up.id); }
  }
  const leaf = typeof value.leaf === "string" && nodes[value.leaf] ? value.leaf : (Object.keys(nodes).at(-1) ?? null);
  return { ...newConversation(), id: typeof value.id === "string" ? value.id : newId(), title: String(value.title ?? ""), system: String(value.system ?? ""),
    created: Number(value.created) || Date.now(), updated: Number(value.updated) || Date.now(), nodes, leaf };
}
