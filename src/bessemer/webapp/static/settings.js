// The chat's settings: models, sampling and its presets, the form of an answer; of one answer, or of two side by side. They are kept
// in this browser.
import { byId, json, make } from "./page.js";

export const settings = byId("settings");
const picker = byId("model-picker");
const sides = { first: settings.querySelector("[data-side=first]"), second: settings.querySelector("[data-side=second]") };
const field = (side, name) => sides[side].querySelector(`[name=${name}]`);
const inputsOf = (side) => [...sides[side].querySelectorAll("input, select, textarea")];
export let models = [];

/** The sampling of a preset; what it does not name stays as it is. */
const PRESETS = {
  precise: { temperature: 0.2, top_p: 0.9, min_p: 0, repetition_penalty: 1 },
  balanced: { temperature: 0.7, top_p: 0.95, min_p: 0, repetition_penalty: 1 },
  inventive: { temperature: 1.1, top_p: 1, min_p: 0.05, repetition_penalty: 1 },
  likeliest: { temperature: 0, top_p: 1, min_p: 0, repetition_penalty: 1 },
};
/** Settings that change nothing at these values, and their names for people. */
const NEUTRAL = { top_k: 0, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0 };
const NAMES = { temperature: "temperature", top_p: "top p", top_k: "top k", min_p: "min p", repetition_penalty: "repetition", presence_penalty: "presence", frequency_penalty: "frequency", seed: "seed", max_tokens: "most tokens", reasoning_effort: "thinking" };

/** What a request says of the sampling, of one side. Raises an error for a schema or tools that are no JSON. */
export function sampling(side) {
  const number = (name) => (field(side, name).value === "" ? undefined : Number(field(side, name).value));
  const options = { model: field(side, "model").value || models[0]?.id };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "max_tokens", "seed"]) {
    const value = number(name);
    if (value !== undefined && value !== NEUTRAL[name]) options[name] = value;
  }
  if (field(side, "stop").value) options.stop = [field(side, "stop").value];
  if (field(side, "effort").value) options.reasoning_effort = field(side, "effort").value;
  const schema = parsed(side, "schema", "the JSON schema"), tools = parsed(side, "tools", "the tools");
  if (schema) options.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  if (tools) options.tools = [tools].flat().map((tool) => (tool.type === "function" ? tool : { type: "function", function: tool }));
  return options;
}

/** The JSON of a field; undefined where it is empty. Raises an error that names it. */
function parsed(side, name, what) {
  const text = field(side, name).value.trim();
  try { return text ? JSON.parse(text) : undefined; } catch (error) { throw new Error(`${what} in the settings: ${error.message}`); }
}

/** Settings of an answer in words, the model first. */
export function inWords({ model, ...options }) {
  const parts = Object.entries(NAMES).filter(([name]) => options[name] !== undefined).map(([name, words]) => `${words} ${options[name]}`);
  return [model, ...parts, ...(options.response_format ? ["JSON"] : []), ...(options.tools ? [`${options.tools.length} tools`] : [])].join(" · ");
}

/** The context of a model in tokens; undefined where it is not known, as of one that is not loaded. */
export async function contextOf(name) {
  const known = () => models.find((one) => one.id === name)?.max_model_len ?? undefined;
  if (known() === undefined) models = (await json("v1/models")).data;
  return known();
}

const SETTINGS = "bessemer-settings";
function save() {
  const values = Object.fromEntries(Object.keys(sides).map((side) => [side, Object.fromEntries(inputsOf(side).map((input) => [input.name, input.value]))]));
  localStorage.setItem(SETTINGS, JSON.stringify(values));
}

function tell(input) {
  const output = input.closest("label")?.querySelector("output");
  if (output) output.textContent = Number(input.value).toFixed(2);
}

function load() {
  let values = {};
  try { values = JSON.parse(localStorage.getItem(SETTINGS)) ?? {}; } catch { /* from another version */ }
  for (const side of Object.keys(sides)) {
    for (const input of inputsOf(side)) {
      const value = values[side]?.[input.name];
      if (typeof value === "string" && (input.tagName !== "SELECT" || [...input.options].some((option) => option.value === value))) input.value = value;
      input.addEventListener("input", () => tell(input));
      tell(input);
    }
  }
}

function usePreset(side) {
  for (const [name, value] of Object.entries(PRESETS[field(side, "preset").value] ?? {})) {
    field(side, name).value = String(value);
    tell(field(side, name));
  }
}

/** Read which models there are, and offer them. Raises as `json`. */
export async function loadModels() {
  models = (await json("v1/models")).data;
  const options = () => models.map((model) => make("option", { value: model.id }, model.id));
  for (const side of Object.keys(sides)) field(side, "model").replaceChildren(...options());
  picker.replaceChildren(...options());
  load();
  picker.value = field("first", "model").value;
  picker.disabled = models.length < 2;
}

settings.addEventListener("submit", (event) => event.preventDefault());
settings.addEventListener("change", (event) => {
  const side = event.target.closest("[data-side]")?.dataset.side;
  if (event.target.name === "preset" && side) usePreset(side);
  // what is changed by hand is no preset any more
  else if (side && event.target.name in PRESETS.balanced) field(side, "preset").value = "";
  picker.value = field("first", "model").value;
  save();
});
picker.addEventListener("change", () => { field("first", "model").value = picker.value; save(); });
byId("beside").addEventListener("change", () => {
  sides.second.hidden = !byId("beside").checked;
  byId("blind").closest("label").hidden = !byId("beside").checked;
});
