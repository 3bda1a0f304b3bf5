// Runs: what has been made, and what is being made. Of files that grow only what is new is fetched.
import { byId, calm, drawn, json, make, request, savePage, say, table } from "./page.js";
import uPlot from "./uplot.js";

const state = byId("state"), place = new URLSearchParams(location.search), name = place.get("run");
const choose = byId("choose"), samplesForm = byId("samples").querySelector("form");
const path = (run, ...parts) => ["inspect/runs", ...[run, ...parts].map(encodeURIComponent)].join("/");
const FIRST = ["loss", "validation_loss", "bits_per_byte", "reward", "held_out_accuracy", "accuracy", "validation_accuracy", "kl", "entropy", "completion_tokens"];
const WORDS = { done: "done", running: "at work", interrupted: "interrupted", failed: "failed", waiting: "waits" };
const EVERY = 1000, SELDOM = 10_000;

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function setPlace(values) {
  for (const [key, value] of Object.entries(values)) if (value) place.set(key, value); else place.delete(key);
  history.replaceState(null, "", `?${place}`);
}

// --- the list -------------------------------------------------------------------------------------------------------

async function showList() {
  const { runs } = await json("inspect/runs");
  byId("all").hidden = false;
  state.textContent = runs.length ? "" : "No recipe has been run here yet: bessemer run quickstart";
  runs.sort((one, two) => two.changed - one.changed);
  const rows = runs.map((run) => make("tr", {},
    make("td", {}, make("a", { href: `runs?run=${encodeURIComponent(run.name)}` }, run.name), make("div", { class: "soft" }, run.description)),
    make("td", {}, make("span", { class: `status ${run.at_work?.status ?? (run.done === run.stages ? "done" : "waiting")}` }, run.at_work ? `${run.at_work.stage}: ${WORDS[run.at_work.status]}` : run.done === run.stages ? "done" : "not finished")),
    make("td", { class: "number" }, `${run.done} of ${run.stages}`), make("td", { class: "number" }, duration(run.seconds)),
    make("td", { class: "number" }, new Date(1000 * run.changed).toLocaleString())));
  const heads = [["Run"], ["State"], ["Stages", "number"], ["Work", "number"], ["Changed", "number"]];
  byId("runs").replaceChildren(make("thead", {}, make("tr", {}, ...heads.map(([head, kind]) => make("th", { scope: "col", class: kind }, head)))), make("tbody", {}, ...rows));
  return runs.some((run) => run.at_work?.status === "running");
}

async function showSweeps() {
  const { sweeps } = await json("inspect/sweeps");
  byId("sweeps").hidden = !sweeps.length;
  byId("sweeps").lastElementChild.replaceChildren(...sweeps.flatMap(({ name: title, columns, rows }) => [
    make("h3", {}, title),
    table(title, columns, rows.map((row) => make("tr", {}, ...row.map((cell, column) => make("td", {}, columns[column] === "name" ? make("a", { href: `runs?run=${encodeURIComponent(cell)}` }, cell) : cell))))),
  ]));
}

async function showEvaluations() {
  const { evaluations } = await json("inspect/evaluations");
  const form = byId("choose-evaluations");
  byId("evaluations").hidden = evaluations.length < 2;
  for (const side of ["first", "second"]) form.elements[side].replaceChildren(...evaluations.map((one) => make("option", {}, one)));
  if (evaluations.length > 1) form.elements.second.selectedIndex = 1;
  const compare = async () => {
    setPlace({ first: form.elements.first.value, second: form.elements.second.value });
    try {
      byId("flips").replaceChildren(drawn((await json(`inspect/evaluations/beside?${new URLSearchParams({ first: form.elements.first.value, second: form.elements.second.value })}`)).html));
    } catch (error) {
      byId("flips").replaceChildren(make("p", { class: "failure" }, error.message));
    }
  };
  form.addEventListener("submit", (event) => { event.preventDefault(); compare(); });
  if (place.has("first")) {
    for (const side of ["first", "second"]) form.elements[side].value = place.get(side);
    compare();
  }
}

// --- one run --------------------------------------------------------------------------------------------------------

let run = null, doneBefore = -1;

async function showRun() {
  run = await json(path(name));
  byId("run").hidden = false;
  state.textContent = "";
  document.title = `${name} · Bessemer`;
  byId("name").textContent = run.name;
  byId("description").textContent = run.description;
  drawStages();
  const done = run.stages.filter((stage) => stage.status === "done").length;
  if (done !== doneBefore) {
    doneBefore = done;
    await Promise.all([drawFigures(), drawSections()]);
    offerStages();
  } else if (run.stages.some((stage) => stage.metrics && ![...choose.elements.stage.options].some((option) => option.value === stage.name))) {
    offerStages();
  }
  return run.stages.some((stage) => stage.status === "running");
}

function drawStages() {
  const rows = run.stages.map((stage) => {
    const step = stage.name === curves.stage && curves.columns.steps.at(-1);
    const facts = stage.problem ?? [stage.summary, duration(stage.seconds), stage.status === "running" && step && stage.steps ? `step ${step.toLocaleString("en")} of ${stage.steps.toLocaleString("en")}` : ""].filter(Boolean).join(" · ");
    return make("li", { class: stage.status, data: { stage: stage.name } }, make("i", { class: "dot", "aria-hidden": "true" }),
      make("strong", {}, stage.name), make("span", { class: `status ${stage.status}` }, WORDS[stage.status]),
      make("span", { class: stage.problem ? "failure" : "soft" }, facts),
      !stage.documents ? null : make("a", { href: `data?${new URLSearchParams({ run: name, stage: stage.name })}` }, "documents"));
  });
  byId("stages").replaceChildren(...rows);
  drawArcs();
}

function drawArcs() {
  const list = byId("stages"), svg = byId("arcs"), at = new Map();
  const top = list.getBoundingClientRect().top;
  for (const row of list.children) { const box = row.getBoundingClientRect(); at.set(row.dataset.stage, box.top - top + box.height / 2); }
  const width = 72, make_ = (from, to, far) => {
    const arc = document.createElementNS("http://www.w3.org/2000/svg", "path"), x = width - 6, reach = far === 1 ? 0 : Math.min(width - 12, 10 + 7 * far);
    arc.setAttribute("d", `M${x} ${from} C${x - reach} ${from + (to - from) * 0.12} ${x - reach} ${to - (to - from) * 0.12} ${x} ${to}`);
    return arc;
  };
  svg.setAttribute("viewBox", `0 0 ${width} ${Math.max(1, list.offsetHeight)}`);
  svg.style.height = `${list.offsetHeight}px`;
  const order = run.stages.map((stage) => stage.name);
  svg.replaceChildren(...run.stages.flatMap((stage, number) => stage.feeds.filter((feed) => at.has(feed)).map((feed) => make_(at.get(feed), at.get(stage.name), number - order.indexOf(feed)))));
}

async function drawFigures() {
  const { figures } = await json(path(name, "figures"));
  byId("figures").replaceChildren(...figures.map(({ label, value, note }) => make("div", {}, make("dt", {}, label), make("dd", {}, value), !note ? null : make("dd", { class: "soft" }, note))));
  byId("figures").hidden = !figures.length;
  byId("links").replaceChildren(...(run.report ? [make("button", { class: "quiet", type: "button", onclick: openReport }, "Open the report")] : []));
}

async function openReport() {
  const window_ = sessionStorage.getItem("bessemer-key") ? null : open(path(name, "report"), "_blank", "noopener");
  if (window_ !== null || !sessionStorage.getItem("bessemer-key")) return;
  // a new tab sends no key
  const link = make("a", { href: URL.createObjectURL(await (await request(path(name, "report"))).blob()), download: `${name}-report.html` });
  link.click();
}

async function drawSections() {
  const made = run.stages.filter((stage) => stage.status === "done");
  byId("sections").hidden = !made.length;
  byId("sections").lastElementChild.replaceChildren(...made.map((stage) => {
    const body = make("div", {}), folded = make("details", {}, make("summary", {}, stage.name), body);
    folded.addEventListener("toggle", async () => {
      if (!folded.open || body.childElementCount) return;
      try {
        const { title, html } = await json(path(name, "stages", stage.name, "section"));
        body.replaceChildren(title ? make("h3", {}, title) : make("p", { class: "soft" }, "It has no section in the report."), drawn(html));
      } catch (error) {
        body.replaceChildren(make("p", { class: "failure" }, error.message));
      }
    });
    return folded;
  }));
}

// --- curves ---------------------------------------------------------------------------------------------------------

/** The records of one stage, by column; `grow` fetches what is new and says whether anything was. */
class Columns {
  constructor(run, stage, what) { Object.assign(this, { run, stage, what, after: "" }); this.begin(); }
  begin() { this.steps = []; this.values = new Map(); this.records = []; }
  /** Two who ask at once wait for the same answer: a record is added once. */
  grow() { return (this.growing ??= this.fetchNew().finally(() => { this.growing = null; })); }
  async fetchNew() {
    let grew = false;
    for (;;) {
      const found = await json(`${path(this.run, "stages", this.stage, this.what)}?${new URLSearchParams({ after: this.after })}`);
      if (found.restarted) { this.begin(); grew = true; }
      this.after = found.after;
      for (const record of found.records) this.add(record);
      grew ||= found.records.length > 0;
      if (!found.more) return grew;
    }
  }
  add(record) {
    if (this.what !== "metrics") { this.records.push(record); return; }
    if (record.step !== this.steps.at(-1)) this.steps.push(record.step);
    for (const [key, value] of Object.entries(record)) {
      if (key === "step" || typeof value !== "number") continue;
      if (!this.values.has(key)) this.values.set(key, []);
      const column = this.values.get(key);
      while (column.length < this.steps.length - 1) column.push(null);
      column[this.steps.length - 1] = value;
    }
  }
  column(key) {
    const column = this.values.get(key) ?? [];
    while (column.length < this.steps.length) column.push(null);
    return column;
  }
}

const none = { steps: [], values: new Map(), records: [], column: () => [] };
const curves = { stage: "", columns: none, other: none, samples: none, keys: null, charts: new Map() };

function offerStages() {
  const trained = run.stages.filter((stage) => stage.metrics), chooser = choose.elements.stage;
  byId("curves").hidden = !trained.length;
  chooser.replaceChildren(...trained.map((stage) => make("option", {}, stage.name)));
  if (!trained.length) return;
  const atWork = trained.find((stage) => stage.status === "running");
  const wanted = place.get("stage") ?? curves.stage;
  chooser.value = trained.some((stage) => stage.name === wanted) ? wanted : (atWork ?? trained.at(-1)).name;
  if (chooser.value !== curves.stage) openStage(chooser.value);
}

async function openStage(stage) {
  curves.stage = stage;
  curves.columns = new Columns(name, stage, "metrics");
  curves.samples = run.stages.find((one) => one.name === stage)?.samples ? new Columns(name, stage, "samples") : none;
  curves.keys = place.get("keys")?.split(",") ?? null;
  closeCharts();
  await openOther();
  await grow();
}

let othersAsked = 0;

async function openOther() {
  const other = choose.elements.other.value, mine = ++othersAsked;
  curves.other = none;
  byId("beside").hidden = !other;
  if (!other) return;
  curves.other = new Columns(other, curves.stage, "metrics");
  try {
    const { html } = await json(path(name, "beside", other));
    if (mine !== othersAsked) return;
    byId("beside").lastElementChild.replaceChildren(drawn(html));
    await curves.other.grow();
  } catch (error) {
    if (mine !== othersAsked) return;
    curves.other = none;
    if (error.status !== 404) byId("beside").lastElementChild.replaceChildren(make("p", { class: "failure" }, error.message));
  }
}

async function grow() {
  if (!curves.stage || curves.columns === none) return;
  const asked = curves.columns;
  const grew = await asked.grow(), wrote = curves.samples === none ? false : await curves.samples.grow();
  if (asked !== curves.columns) return;
  if (grew) { drawKeys(); drawCharts(); }
  if (wrote) drawSamples();
}

function drawKeys() {
  const known = [...curves.columns.values.keys()];
  const box = byId("keys");
  curves.keys ??= FIRST.filter((key) => known.includes(key)).slice(0, 4);
  if (!curves.keys.length) curves.keys = known.slice(0, 1);
  if (box.dataset.known === known.join() && box.childElementCount > 1) return;
  box.dataset.known = known.join();
  box.replaceChildren(box.firstElementChild, ...known.map((key) => {
    const tick = make("input", { type: "checkbox", value: key, checked: curves.keys.includes(key) });
    tick.addEventListener("change", () => {
      curves.keys = tick.checked ? [...curves.keys, key] : curves.keys.filter((one) => one !== key);
      setPlace({ keys: curves.keys.join(",") });
      drawCharts();
    });
    return make("label", {}, tick, key.replaceAll("_", " "));
  }));
}

function smoothed(column) {
  const weight = Number(choose.elements.smooth.value);
  if (!weight) return column;
  let mean = null, norm = 0;
  return column.map((value) => {
    if (value === null) return null;
    mean = weight * (mean ?? 0) + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}

function dataOf(key) {
  const own = [curves.columns.steps, smoothed(curves.columns.column(key))];
  const both = curves.other === none ? own : uPlot.join([own, [curves.other.steps, smoothed(curves.other.column(key))]]);
  return choose.elements.logarithmic.checked ? [both[0], ...both.slice(1).map((column) => column.map((value) => (value > 0 ? value : null)))] : both;
}

function resolved(variable) {
  // a canvas knows no light-dark(): the browser resolves it on an element
  const probe = make("i", {});
  probe.style.color = `var(${variable})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

const short = (value) => value === null || value === undefined ? "–" : Math.abs(value) >= 1000 ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : value === 0 ? "0" : Number(value.toPrecision(4)).toString();

function drawCharts() {
  const box = byId("charts");
  for (const [key, chart] of curves.charts) if (!curves.keys.includes(key)) { chart.box.remove(); chart.plot.destroy(); curves.charts.delete(key); }
  for (const key of curves.keys) {
    const data = dataOf(key), known = curves.charts.get(key);
    if (known && known.series === data.length) { known.plot.setData(data); known.box.setAttribute("aria-label", label(key)); continue; }
    if (known) { known.box.remove(); known.plot.destroy(); }
    const chart = make("figure", { class: "chart", role: "img", "aria-label": label(key) }, make("figcaption", {}, key.replaceAll("_", " ")));
    box.append(chart);
    const line = resolved("--line"), soft = resolved("--soft");
    const axis = { stroke: soft, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "11px system-ui, sans-serif" };
    const series = (title, stroke, width) => ({ label: title, stroke, width, spanGaps: true, points: { show: false }, value: (_, value) => short(value) });
    const plot = new uPlot({
      width: chart.clientWidth, height: 230, legend: { live: true }, cursor: { drag: { x: true, y: false } },
      scales: { x: { time: false }, y: choose.elements.logarithmic.checked ? { distr: 3 } : {} },
      axes: [axis, { ...axis, size: 58, values: (_, values) => values.map(short) }],
      series: [{ label: "step", value: (_, value) => short(value) }, series(name, resolved("--heat"), 2), ...(data.length > 2 ? [series(curves.other.run, soft, 1.5)] : [])],
    }, data, chart);
    curves.charts.set(key, { box: chart, plot, series: data.length });
  }
  drawStages();
}

function label(key) {
  const column = curves.columns.column(key), values = column.filter((value) => value !== null);
  return `${key.replaceAll("_", " ")} of ${curves.stage} over ${curves.columns.steps.length} steps, from ${short(values[0])} to ${short(values.at(-1))}`;
}

function closeCharts() {
  for (const { box, plot } of curves.charts.values()) { plot.destroy(); box.remove(); }
  curves.charts.clear();
}

const again = () => { closeCharts(); if (curves.keys) drawCharts(); };

// --- samples --------------------------------------------------------------------------------------------------------

function drawSamples() {
  const steps = [...new Set(curves.samples.records.map((record) => record.step))], slider = samplesForm.elements.at;
  byId("samples").hidden = !steps.length;
  const wasLast = slider.value === slider.max;
  slider.max = String(Math.max(0, steps.length - 1));
  if (wasLast) slider.value = slider.max;
  const step = steps[Number(slider.value)];
  samplesForm.querySelector("output").textContent = (step ?? 0).toLocaleString("en");
  byId("texts").replaceChildren(...curves.samples.records.filter((record) => record.step === step).map((record) => make("p", { class: "answered" }, make("span", { class: "prompt" }, record.prompt), record.text)));
}

// --- the page -------------------------------------------------------------------------------------------------------

async function begin() {
  const others = (await json("inspect/runs")).runs.map((one) => one.name).filter((one) => one !== name);
  choose.elements.other.replaceChildren(make("option", { value: "" }, "nothing"), ...others.map((one) => make("option", {}, one)));
  if (others.includes(place.get("other"))) choose.elements.other.value = place.get("other");
}

choose.addEventListener("submit", (event) => event.preventDefault());
samplesForm.addEventListener("submit", (event) => event.preventDefault());
choose.elements.stage.addEventListener("change", () => { setPlace({ stage: choose.elements.stage.value, keys: "" }); openStage(choose.elements.stage.value); });
choose.elements.other.addEventListener("change", async () => { setPlace({ other: choose.elements.other.value }); await openOther(); again(); });
choose.elements.smooth.addEventListener("input", calm(30, () => { choose.querySelector("output").textContent = choose.elements.smooth.value === "0" ? "" : choose.elements.smooth.value; drawCharts(); }));
choose.elements.logarithmic.addEventListener("change", again);
samplesForm.elements.at.addEventListener("input", drawSamples);
byId("theme").addEventListener("click", () => setTimeout(again));
addEventListener("resize", calm(120, () => { if (run) drawStages(); for (const { box, plot } of curves.charts.values()) plot.setSize({ width: box.clientWidth, height: 230 }); }));
byId("export-page").addEventListener("click", () => savePage(byId("view"), name ? `Run ${name}` : "Runs"));

async function live() {
  let isLive = false;
  try {
    if (!document.hidden || run === null) {
      isLive = name ? await showRun() : await showList();
      if (name) await grow();
    }
  } catch (error) {
    state.replaceChildren(make("span", { class: "failure" }, error.message));
    // what is refused stays refused; a server that is busy is asked again
    if ([401, 403, 404].includes(error.status)) return;
  }
  setTimeout(live, isLive ? EVERY : SELDOM);
}

try {
  if (name) await begin(); else await Promise.all([showSweeps(), showEvaluations()]);
  await live();
  say(name ? `run ${name}` : "runs");
} catch (error) {
  state.replaceChildren(make("span", { class: "failure" }, error.message));
}
