"""Where the words of an answer stand in a run's training data: documents with the filters' verdict, and rows of examples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.core.errors import BessemerError
from bessemer.data.corpus.reader import TRAIN, find_document, holds_documents
from bessemer.data.corpus.shared_spans import SpanFinder, document_spans, longest_apart
from bessemer.posttraining.data.hub import is_hub_dataset
from bessemer.posttraining.data.made import is_data_name
from bessemer.posttraining.data.search import ExampleFile, ExamplePassage, example_spans
from bessemer.webapp.access import missing

if TYPE_CHECKING:
    from bessemer.data.stages.explain import Score
    from bessemer.pipeline.run_folder import RunFolder

#: Places that are shown of a span, and documents whose verdict is computed.
_PLACES, _VERDICTS = 3, 12


def origins_of(run: RunFolder, text: str) -> dict[str, Any]:
    """The spans of a text that documents or examples of a run hold. Raises ApiError (404) for a run without either."""
    stage, folder = last_documents(run)
    files = list(example_files(run))
    if folder is None and not files:
        raise missing(f"the run {run.name!r} has neither documents nor examples")
    finder = SpanFinder(text)
    documents, looked_at, count = ([], 0, 0) if folder is None else document_spans(folder / "documents", finder, split=TRAIN)
    examples, rows = example_spans(files, finder)
    spans = []
    verdicts: dict[str, str | None] = {}
    for start, end in longest_apart([*(one.span for one in documents), *(span for span, _ in examples)]):
        places = [one for one in documents if (one.span.start, one.span.end) == (start, end)]
        learnt = [passage for span, passage in examples if (span.start, span.end) == (start, end)]
        for one in places[:_PLACES]:
            identity = one.row["id"]
            if identity not in verdicts and len(verdicts) < _VERDICTS and folder is not None:
                verdicts[identity] = _verdict(run, folder / "documents", identity)
        spans.append(
            {
                "start": start,
                "end": end,
                "in_documents": len(places),
                "in_examples": len(learnt),
                "documents": [
                    {
                        "id": one.row["id"],
                        "source": one.row["source"],
                        "url": one.row["url"],
                        "split": one.row["split"],
                        "left": one.left,
                        "right": one.right,
                        "verdict": verdicts.get(one.row["id"]),
                    }
                    for one in places[:_PLACES]
                ],
                "examples": [described_example(passage) for passage in learnt[:_PLACES]],
            }
        )
    looked = {"stage": stage, "looked_at": looked_at, "documents": count, "rows": rows}
    return {"run": run.name, "text": text, "spans": spans, **looked}


def _verdict(run: RunFolder, folder: Path, identity: str) -> str | None:
    """What the filters said of a document, in one line; None where they cannot be asked, or none has a limit."""
    from bessemer.webapp.data_api import explained

    row = find_document(folder, identity)
    if row is None:
        return None
    try:
        explanation = explained(run, row["text"], row["url"])
    except (BessemerError, ModuleNotFoundError):
        return None
    return verdict_of(explanation.scores)


def verdict_of(scores: list[Score] | Any) -> str | None:
    """The scores that have limits, such as "kept: gopher: words 212 ≥ 50", the closest to its limit first, two at most."""
    from bessemer.data.thresholds import display_name

    said: list[tuple[float, str]] = []
    for score in scores:
        if isinstance(score.value, bool) or not isinstance(score.value, int | float):
            continue
        for bound, sign in zip(score.limit, "≥≤", strict=True):
            if bound is not None:
                margin = abs(score.value - bound) / max(abs(bound), 1e-9)
                said.append((margin, f"{display_name(score.column)} {score.value:.4g} {sign} {bound:g}"))
    return f"kept: {'; '.join(text for _, text in sorted(said)[:2])}" if said else None


def last_documents(run: RunFolder) -> tuple[str | None, Path | None]:
    """The last stage that holds documents, with its folder; None where none does."""
    stages = reversed(run.stages().items())
    return next(((name, folder) for name, folder in stages if holds_documents(folder / "documents")), (None, None))


#: Kinds of stages that learn from rows, and the rows that stages make for them, below their folders.
_EXAMPLE_KINDS = ("sft", "distillation", "preference", "reward", "rl")
_CONVERSATIONS = Path("conversations", "train.jsonl")
_MADE_ROWS = ("revisions.jsonl", "synthetic.jsonl", "preferences.jsonl", "honesty.jsonl")


def example_files(run: RunFolder) -> Iterator[ExampleFile]:
    """The rows that the run's stages have learnt from and made: the conversations that a stage kept of them, or the files that
    its settings name, where they still are."""
    stages = run.stages()
    for name, section in run.record()["recipe"].items():
        settings = section if isinstance(section, dict) else {"data": section}
        kind, folder = str(settings.get("kind", name)), stages.get(name)
        if folder is None:
            continue
        for made in _MADE_ROWS:
            if (folder / made).is_file():
                yield ExampleFile(name, kind, folder / made)
        if (folder / _CONVERSATIONS).is_file():
            yield ExampleFile(name, kind, folder / _CONVERSATIONS, is_split=True)
        elif kind in _EXAMPLE_KINDS:
            data = settings.get("data")
            for given in data if isinstance(data, list) else ():
                # relative to where the recipe ran, as the settings of `clean` are
                if isinstance(given, str) and is_data_name(given) and not is_hub_dataset(given) and Path(given).is_file():
                    yield ExampleFile(name, kind, Path(given))


def described_example(passage: ExamplePassage) -> dict[str, Any]:
    """A passage of a row as the pages show it."""
    file = passage.file
    return {
        "stage": file.stage,
        "kind": file.kind,
        # a file's own name: where it lies is not for clients
        "file": file.path.name,
        "split": TRAIN if file.is_split else None,
        "row": passage.row,
        "part": passage.part,
        "left": passage.left,
        "found": passage.found,
        "right": passage.right,
    }
