// Where the words of an answer come from: its spans that stand in the training data, and each span's places with the filters' verdict.
import { json, make } from "./page.js";

/** What asks for it, and the strip that follows. asked: { model, before, ids }. */
export function origins(asked) {
  const box = make("div", { class: "origins" }), ask = make("button", { class: "quiet bordered", type: "button", onclick: look }, "Where the words come from");
  box.append(ask);
  return box;

  async function look() {
    box.replaceChildren(make("p", { class: "soft", role: "status" }, "Reading the training data …"));
    try {
      draw(await json("inspect/origins", { body: asked }));
      box.dataset.done = "true";
    } catch (error) {
      box.replaceChildren(make("p", { class: "failure" }, error.message));
    }
  }

  function draw({ run, stage, text, spans, looked_at, documents, rows }) {
    const places = make("div", { class: "places" });
    const show = (span, button) => {
      box.querySelector("[aria-pressed=true]")?.setAttribute("aria-pressed", "false");
      button.setAttribute("aria-pressed", "true");
      places.replaceChildren(...drawPlaces(run, stage, text.slice(span.start, span.end), span));
    };
    const parts = [];
    let reached = 0;
    for (const span of spans) {
      const button = make("button", { type: "button", "aria-pressed": "false", title: counted(span), class: span.in_documents ? "of-documents" : "of-examples", onclick: () => show(span, button) }, text.slice(span.start, span.end));
      parts.push(text.slice(reached, span.start), button);
      reached = span.end;
    }
    const share = spans.reduce((sum, span) => sum + span.end - span.start, 0) / Math.max(1, text.length);
    const where = [documents ? `${looked_at < documents ? `${looked_at.toLocaleString("en")} of ` : ""}${documents.toLocaleString("en")} training documents` : null, rows ? `${rows.toLocaleString("en")} rows of examples` : null].filter(Boolean).join(" and ");
    const said = spans.length ? `${Math.round(100 * share)} % of the answer, in spans of four words or more, stands in ${where}. Choose a span.`
      : text.trim().split(/\s+/).length < 4 ? "The answer has fewer than four words: too few to look for." : `No four words of the answer in a row stand in ${where}.`;
    box.replaceChildren(make("p", { class: "answered" }, ...parts, text.slice(reached)), make("p", { class: "soft" }, said), places);
  }
}

const counted = (span) => [span.in_documents ? `in ${span.in_documents.toLocaleString("en")} documents` : null, span.in_examples ? `in ${span.in_examples.toLocaleString("en")} rows` : null].filter(Boolean).join(", ");

function drawPlaces(run, stage, found, span) {
  return [make("p", { class: "soft" }, `${counted(span)}:`),
    ...span.documents.map((one) => make("div", { class: "passage" }, make("p", {}, one.left, make("mark", {}, found), one.right),
      make("p", { class: "soft" }, ["pretraining", one.split, one.url ?? one.source, one.verdict].filter(Boolean).join(" · "), " · ", make("a", { href: `data?${new URLSearchParams({ run, stage, id: one.id })}` }, "what the filters said")))),
    ...span.examples.map((one) => make("div", { class: "passage" }, make("p", {}, one.left, make("mark", {}, one.found), one.right),
      make("p", { class: "soft" }, [one.kind, one.split, `${one.part} of row ${one.row.toLocaleString("en")} of ${one.file}`].filter(Boolean).join(" · "))))];
}
