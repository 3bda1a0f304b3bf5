// Colours code on a thread of its own: a language's grammar takes long to compile, and the page would stand still meanwhile.
// Takes { id, text, language } and answers { id, parts }: texts and [class, parts]; null where the language is not known.
import highlight from "./vendor/highlight.js";

/** The class of what a grammar calls `title.function`: that of the first part. */
const classOf = (scope) => (scope ? `hljs-${scope.split(".")[0]}` : "");
const plain = ({ children }) => children.map((part) => (typeof part === "string" ? part : [classOf(part.scope), plain(part)]));

addEventListener("message", ({ data: { id, text, language } }) => {
  const isKnown = highlight.getLanguage(language);
  postMessage({ id, parts: isKnown ? plain(highlight.highlight(text, { language, ignoreIllegals: true })._emitter.root) : null });
});
