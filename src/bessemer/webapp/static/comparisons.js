// Comparisons of two answers whose names were hidden: kept in this browser, and shown as rates of winning with their intervals.
import { byId, download, given, json, make, say, table, whole } from "./page.js";

const KEPT = "bessemer-comparisons";
function all() { try { return JSON.parse(localStorage.getItem(KEPT)) ?? []; } catch { return []; } }

/** Keep a comparison: { settings: of both answers, in words; winner: 0, 1 or null for neither }. */
export function record(comparison) { localStorage.setItem(KEPT, JSON.stringify([...all(), comparison])); }

/** Wilson's interval of 95 % of a share of `count`; a tie is half a win. */
export function interval(wins, count, z = 1.959964) {
  const share = wins / count, centre = (share + (z * z) / (2 * count)) / (1 + (z * z) / count);
  const half = (z / (1 + (z * z) / count)) * Math.sqrt((share * (1 - share)) / count + (z * z) / (4 * count * count));
  return [Math.max(0, centre - half), Math.min(1, centre + half)];
}

/** Of each pair of settings: how often the first won, the second, and neither. */
export function tallied(comparisons) {
  const pairs = new Map();
  for (const { settings, winner } of comparisons) {
    const isTurned = settings[0] > settings[1], names = isTurned ? [settings[1], settings[0]] : settings, key = JSON.stringify(names);
    const tally = pairs.get(key) ?? pairs.set(key, { names, wins: [0, 0], ties: 0 }).get(key);
    if (winner === null) tally.ties += 1;
    else tally.wins[isTurned ? 1 - winner : winner] += 1;
  }
  return [...pairs.values()];
}

/** Start `preference` on the pairs that the server has kept, and say where its run is seen. */
async function train(button) {
  button.disabled = true;
  const place = byId("training");
  try {
    const { run, pairs } = await json("feedback/train", { body: {} });
    place.replaceChildren(`Learning from ${whole(pairs)} pairs: `, make("a", { href: `runs?run=${encodeURIComponent(run)}` }, run));
  } catch (error) {
    place.replaceChildren(make("span", { class: "failure" }, error.message));
    button.disabled = false;
  }
  say(place.textContent);
}

/** Show the rates in the settings, where anything was compared. */
export function drawComparisons() {
  const comparisons = all(), place = byId("comparisons");
  place.hidden = !comparisons.length;
  if (!comparisons.length) return;
  const shown = (share) => `${whole(100 * share)} %`;
  const rows = tallied(comparisons).map(({ names, wins: [first, second], ties }) => {
    const count = first + second + ties, [low, high] = interval(first + ties / 2, count);
    return make("tr", {}, make("td", {}, names[0], make("br"), "against ", names[1]), make("td", { class: "number" }, `${shown((first + ties / 2) / count)} (${shown(low)} – ${shown(high)})`), make("td", { class: "number" }, `${first} – ${ties} – ${second}`));
  });
  place.replaceChildren(make("h2", {}, "Compared blindly"),
    table("Comparisons", ["settings", "the first wins (95 %)", "wins – ties – losses"], rows),
    ...(given.trains ? [make("p", { class: "soft" }, "All pairs that this server has kept become training data: a run of ", make("code", {}, "preference"), " (DPO) on the model makes a new one, in minutes of this machine."),
      make("button", { class: "strong", type: "button", onclick: (event) => train(event.target) }, "Learn from the preferences"), make("p", { id: "training", role: "status" })] : []),
    make("div", { class: "row" },
      make("button", { class: "quiet", type: "button", onclick: () => download("comparisons.json", "application/json", JSON.stringify(comparisons, null, 1)) }, "Export"),
      make("button", { class: "quiet", type: "button", onclick: () => { if (confirm("Forget all comparisons?")) { localStorage.removeItem(KEPT); drawComparisons(); } } }, "Forget")));
}
