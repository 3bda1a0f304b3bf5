// Answers as they come: requests of the API, their streams, and what is recorded of each token while it is sampled.
import { events, json, percent, Refused, request, whole } from "./page.js";
import * as documents from "./documents.js";
import { contextOf } from "./settings.js";
import { messagesTo } from "./store.js";

/** Alternatives of each token that are recorded. */
const RECORDED = 20;
/** Tokens that a plain completion may have where the model's context is not known. */
const MOST_TOKENS = 4096;
/** Milliseconds between two looks at a model that is being opened. */
const LOOK = 1000;

// --- what was sampled ---------------------------------------------------------------------------------------------------

const idOf = (token) => Number(token.slice("token_id:".length));
const short = (logProb) => Math.round(logProb * 1e5) / 1e5;

/** Keep the log-probabilities of tokens of a chat: `node.top[place]` is [of the token, ids of the likeliest, theirs]. */
function recordChat(node, content) {
  for (const { token, logprob, top_logprobs } of content) keep(node, idOf(token), logprob, top_logprobs.map((one) => [idOf(one.token), one.logprob]));
}

function recordCompletion(node, { tokens, token_logprobs, top_logprobs }) {
  tokens.forEach((token, place) => keep(node, idOf(token), token_logprobs[place], Object.entries(top_logprobs[place]).map(([other, value]) => [idOf(other), value])));
}

function keep(node, id, logProb, alternatives) {
  node.top ??= [];
  // tokens that were not sampled, such as the end of thinking within a budget, have none
  while (node.top.length < node.ids.length && node.ids[node.top.length] !== id) node.top.push(null);
  if (node.top.length >= node.ids.length) return;
  const best = alternatives.sort((one, two) => two[1] - one[1]).slice(0, RECORDED);
  node.top.push([short(logProb), best.map(([other]) => other), best.map(([, value]) => short(value))]);
}

// --- streams --------------------------------------------------------------------------------------------------------------

/** The events of an answer to a conversation: { text, thinking, ids, reason, usage }. says: takes a note for the answer.
 *
 *  A small model's context fills soon: the oldest turns are left out until the request fits, and the answer says so. goesOn: whether it
 *  goes on behind its text. */
export async function* chatEvents(conversation, node, signal, says, goesOn = false) {
  const path = messagesTo(conversation, node.parent), system = path[0]?.role === "system" ? path.splice(0, 1) : [];
  const options = { ...node.settings }, stores = await documents.storesOf(conversation);
  if (stores.length) options.retrieval = { vector_store_ids: stores };
  if (goesOn) {
    path.push({ role: "assistant", content: node.content });
    Object.assign(options, { continue_final_message: true, add_generation_prompt: false });
  }
  let left = (goesOn && node.left) || 0, response;
  for (;;) {
    const recorded = { return_token_ids: true, logprobs: true, top_logprobs: RECORDED, return_tokens_as_token_ids: true };
    const body = { ...options, stream: true, stream_options: { include_usage: true }, ...recorded, messages: [...system, ...path.slice(left)] };
    try {
      response = await request("v1/chat/completions", { body, signal });
      // fewer tokens than were asked for: the oldest turns make room for them
      if (!response.headers.has("x-max-tokens") || path.length - left <= 2) break;
      response.body.cancel();
      left += 2;
    } catch (error) {
      if (!(error instanceof Refused) || error.code !== "context_length_exceeded") throw error;
      if (path.length - left > 2) left += 2;
      else if (options.max_tokens) delete options.max_tokens;
      else throw error;
    }
  }
  if (left) node.left = left;
  if (left) says(`the oldest ${left} messages no longer fit the model's context`);
  const calls = [];
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.prompt_token_ids && !goesOn) node.promptIds = event.prompt_token_ids;
    if (event.retrieval) { node.sources = event.retrieval.sources; node.annotations = []; }
    const choice = event.choices[0];
    for (const one of choice?.delta?.annotations ?? []) node.annotations.push(one);
    if (choice?.statements) node.statements = choice.statements;
    node.ids.push(...(choice?.token_ids ?? []));
    if (choice?.logprobs) recordChat(node, choice.logprobs.content);
    for (const { index, function: part } of choice?.delta?.tool_calls ?? []) {
      calls[index] ??= { name: "", arguments: "" };
      calls[index].name += part.name ?? "";
      calls[index].arguments += part.arguments ?? "";
    }
    yield { text: choice?.delta?.content ?? "", thinking: choice?.delta?.reasoning ?? "", reason: choice?.finish_reason, usage: event.usage };
  }
  // the page runs no tool: it shows how one would be called
  for (const call of calls) yield { text: `\n\n\`\`\`json\n{"name": ${JSON.stringify(call.name)}, "arguments": ${call.arguments}}\n\`\`\`\n`, thinking: "" };
}

/** The events of an answer that goes on behind the tokens that it has. */
export async function* completionEvents(node, signal) {
  const { reasoning_effort, response_format, tools, ...options } = node.settings;
  const begun = [...node.promptIds, ...node.ids], context = await contextOf(options.model);
  const left = (context ?? begun.length + MOST_TOKENS) - begun.length;
  if (left < 1) throw new Error("the model's context ends here");
  const recorded = { return_token_ids: true, logprobs: RECORDED, return_tokens_as_token_ids: true };
  const body = { ...options, max_tokens: Math.min(options.max_tokens ?? left, left), prompt: begun, stream: true, stream_options: { include_usage: true }, ...recorded };
  for await (const event of events(await request("v1/completions", { body, signal }))) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    node.ids.push(...(choice?.token_ids ?? []));
    if (choice?.logprobs) recordCompletion(node, choice.logprobs);
    yield { text: choice?.text ?? "", thinking: "", reason: choice?.finish_reason, usage: event.usage };
  }
}

/** Look at a model until it is open, and call `tell` with { seconds, bytes, usual } while it is loading: for how long, how large it
 *  is, and how long it took the last time. Ends when `isOver` says so. */
export async function watchOpening(model, tell, isOver) {
  const KEY = `bessemer-opening-${model}`;
  let longest = 0;
  for (;;) {
    await new Promise((go) => setTimeout(go, LOOK));
    if (isOver()) break;
    let state;
    try { state = await json(`inspect/opening/${encodeURIComponent(model)}`); } catch { return; }
    if (isOver() || state.state === "open") break;
    if (state.state !== "loading") continue;
    longest = state.seconds;
    tell({ ...state, usual: Number(localStorage.getItem(KEY)) || null });
  }
  if (longest) localStorage.setItem(KEY, String(longest));
}

/** What is said below an answer of its making. */
export function described(usage, streaming, wait, reason, content, note) {
  const parts = [];
  if (usage) {
    const count = usage.completion_tokens, seconds = (streaming > 50 ? streaming : streaming + wait) / 1000;
    parts.push(`${count} token${count === 1 ? "" : "s"}`);
    if (content && seconds > 0) parts.push(`${whole(count / seconds)} tokens/s`);
    if (usage.prompt_tokens_details?.cached_tokens) parts.push(`${percent(usage.prompt_tokens_details.cached_tokens / usage.prompt_tokens)} of the prompt remembered`);
  }
  if (reason === "length") parts.push("cut at the most tokens");
  if (reason === "stopped") parts.push("stopped");
  if (reason === "stop" && !content) parts.push("the model said nothing");
  if (note) parts.push(note);
  return parts.join(" · ");
}
