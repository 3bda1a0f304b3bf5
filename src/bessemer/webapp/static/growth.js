// How an answer's tokens grew likely: the same tokens, as every model of the run saw them, from the untrained one to the last.
import { events, make, percent, request } from "./page.js";

const nameOf = (one) => (one.step === null ? one.stage : `${one.stage}, step ${one.step.toLocaleString("en")}`);
/** The mean surprise of the tokens in bits. */
const bitsOf = (shares) => { const known = shares.filter((share) => share !== null); return known.reduce((sum, share) => sum - Math.log2(Math.max(share, 1e-12)), 0) / Math.max(1, known.length); };

/** What asks for it, and the slider that follows. asked: { model, before, ids }; tint: colours the tokens by probabilities; null: as
 *  they were. Its `of(place)` says in words how the token there grew; null before anything is known. */
export function growth(asked, tint) {
  const models = [], state = make("p", { class: "soft growing", role: "status" });
  const slider = make("input", { type: "range", min: "0", step: "1", "aria-label": "Model of the run", oninput: () => show(Number(slider.value)) }), row = make("div", { class: "row growing", hidden: true }, make("span", { class: "soft" }, "untrained"), slider, make("span", { class: "soft" }, "last"));
  const box = make("div", { class: "growth" }, make("button", { class: "quiet bordered", type: "button", onclick: ask }, "Through the checkpoints"), row, state);

  function show(place) {
    const one = models[place];
    slider.value = String(place);
    tint(one.probabilities);
    state.textContent = `${nameOf(one)}: ${bitsOf(one.probabilities).toFixed(2)} bits a token`;
    box.dataset.model = nameOf(one);
  }

  async function ask() {
    box.querySelector("button").hidden = true;
    const bar = make("progress", { max: "1", "aria-label": "Progress" });
    state.replaceChildren(bar, " reading the models of the run …");
    try {
      for await (const event of events(await request("inspect/growth", { body: asked }))) {
        if (event.error) throw new Error(event.error.message);
        bar.value = event.progress;
        if (event.probabilities) models.push(event);
      }
      if (!models.length) throw new Error("no model of the run can read these tokens");
      slider.max = String(models.length - 1);
      row.hidden = false;
      show(models.length - 1);
    } catch (error) {
      state.replaceChildren(make("span", { class: "failure" }, error.message));
    }
  }

  return { box, of: (place) => (models.length ? models.map((one) => (one.probabilities[place] === null ? "–" : percent(one.probabilities[place]))).join(" → ") : null) };
}
