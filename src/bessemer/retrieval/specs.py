"""The stages `index`, `cited` and `questions`: documents that answers are found in, and what is made of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bessemer.core.hashing import hash_file
from bessemer.core.report import Facts, Metrics, Part, Section, StageReport, Text
from bessemer.core.stage import Outside, StageContext, StageSpec
from bessemer.retrieval.config import (
    CITED_VERSION,
    INDEX_VERSION,
    QUESTIONS_VERSION,
    CitedConfig,
    IndexConfig,
    IndexStageConfig,
    QuestionsConfig,
)

#: What both stages import.
_PACKAGES = ("lancedb", "pyarrow", "torch", "safetensors", "tokenizers")


def index_report(stage: StageReport) -> Section:
    """How many documents there are to find."""
    parts: list[Part] = [
        Text(
            "Documents cut into passages, which are searched by their words and by their meaning; an answer cites what was "
            "found.",
            lead=True,
        ),
        Facts(stage.metrics),
    ]
    return Section(stage.titled("Index of documents"), parts)


def index_line(metrics: Metrics) -> str:
    """Documents and passages."""
    return f"{metrics['documents']:,} documents, {metrics['passages']:,} passages"


def index_next_steps(stage: StageReport) -> list[str]:
    """Asking the run's model, where it has one, and serving it with its documents."""
    if not (stage.run.folder / "model").exists():
        return []
    run, place = shlex.quote(stage.run.name), shlex.quote(str(stage.run.folder / "index"))
    # the model that answers knows which names are known, and orders what was found
    ask = f"bessemer ask {run} {place} 'How do I parse JSON?' --sources each --rerank {run}"
    return [ask, f"bessemer serve {run} --index {place} --rerank {run}"]


def cited_report(stage: StageReport) -> Section:
    """How many conversations there are."""
    parts: list[Part] = [
        Text(
            "Questions made of passages of the index, with what a search finds for them as sources, and an answer that cites "
            "the right one, or says that none holds it.",
            lead=True,
        ),
        Facts(stage.metrics),
    ]
    return Section(stage.titled("Conversations with citations"), parts)


def cited_line(metrics: Metrics) -> str:
    """Conversations, and those without an answer."""
    return f"{metrics['conversations']:,} conversations, {metrics['unanswered']:,} of them without an answer in their sources"


def _index(context: StageContext) -> dict[str, Any]:
    from bessemer.data.sources.source import Tally
    from bessemer.retrieval.documents import documents_of, remember_roots, sources_of
    from bessemer.retrieval.index import CACHE, build_index

    config, out = context.config, context.out / "index"
    names = [_placed(name, context.folder) for name in config.documents]
    sources = [source for name in names for source in sources_of(name)]
    values = {name: getattr(config, name) for name in IndexConfig.model_fields}
    plain = IndexConfig(**values | {"embedder": _placed(config.embedder, context.folder)})
    tally = Tally()
    documents = documents_of(sources, out / CACHE, tally, context.progress)
    summary = build_index(documents, out, plain, progress=context.progress)
    remember_roots(out, names)
    for loss in tally.losses:
        context.progress.say(f"  left out: {loss}")
    return {"documents": summary.documents, "passages": summary.passages, "empty": summary.empty}


def _placed(name: str, folder: Path) -> str:
    """A name, or the path from the recipe's folder where a file or a folder is called so."""
    return str(folder / name) if (folder / name).exists() else name


def _index_fingerprint(config: IndexStageConfig, outside: Outside) -> Any:
    """The documents' files or their sources, and the embedder's weights."""
    from bessemer.data.sources.registry import source_fingerprint
    from bessemer.retrieval.documents import sources_of

    documents: list[Any] = []
    for name in config.documents:
        place = outside.folder / name
        if place.exists():
            paths = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
            documents.append({str(path.relative_to(outside.folder)): hash_file(path) for path in paths})
        else:
            documents += [
                source_fingerprint(source, cache=outside.cache, fetch=outside.fetch, progress=outside.progress)
                for source in sources_of(name)
            ]
    return [documents, _embedder_files(config.embedder, outside.folder)]


def _embedder_files(name: str, folder: Path) -> Any:
    from bessemer.retrieval.embed import packaged_minilm

    place = packaged_minilm() if name == "minilm" else folder / name
    if place is None or not place.is_dir():
        return name
    return {path.name: hash_file(path) for path in sorted(place.glob("*.safetensors"))}


def _index_unusable(config: IndexStageConfig) -> None:
    """Raises ArtefactError before anything runs where the packaged embedder is missing."""
    if config.embedder == "minilm":
        from bessemer.retrieval.embed import missing_minilm, packaged_minilm

        if packaged_minilm() is None:
            raise missing_minilm()


def _cited(context: StageContext) -> dict[str, Any]:
    from bessemer.retrieval.index import open_index
    from bessemer.retrieval.questions import cited_conversations

    config = context.config
    rows = list(
        cited_conversations(
            open_index(context.inputs["index"]),
            config.count,
            unanswered=config.unanswered,
            longest=config.longest,
            most_sources=config.most_sources,
            seed=context.seed,
        )
    )
    write_lines(context.out / "cited.jsonl", rows)
    return {"conversations": len(rows), "unanswered": sum(not row["held"] for row in rows)}


def _questions(context: StageContext) -> dict[str, Any]:
    from bessemer.retrieval.index import open_index
    from bessemer.retrieval.questions import contrastive_rows

    config = context.config
    rows = list(contrastive_rows(open_index(context.inputs["index"]), config.count, config.negatives, context.seed))
    write_lines(context.out / "questions.jsonl", rows)
    return {"questions": len(rows), "negatives": sum(len(row["negatives"]) for row in rows)}


def questions_line(metrics: Metrics) -> str:
    """Questions, and passages that do not answer them."""
    return f"{metrics['questions']:,} questions, {metrics['negatives']:,} hard negatives"


def write_lines(path: Path, rows: Sequence[Metrics]) -> None:
    """Write rows as JSON lines."""
    import json

    from bessemer.core.store import write_text

    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _packages(config: Any) -> Sequence[str]:
    return _PACKAGES


STAGES = (
    StageSpec(
        kind="index",
        summary="Index documents, which answers are found in and cite.",
        config=IndexStageConfig,
        version=INDEX_VERSION,
        needs={},
        makes={"index": "index"},
        links={"index": "index"},
        example="index: [python_docs]",
        remedy="make again: it holds the document",
        report=index_report,
        summary_line=index_line,
        next_steps=index_next_steps,
        run=_index,
        fingerprint=_index_fingerprint,
        packages=_packages,
        check=_index_unusable,
    ),
    StageSpec(
        kind="cited",
        summary="Make conversations of an index, whose answers cite their sources or say that these hold none.",
        config=CitedConfig,
        version=CITED_VERSION,
        needs={"index": "index"},
        makes={"cited": "cited.jsonl"},
        example="cited: {count: 240}",
        remedy="make again: it quotes the document",
        report=cited_report,
        summary_line=cited_line,
        run=_cited,
        uses_seed=True,
        packages=_packages,
    ),
    StageSpec(
        kind="questions",
        summary="Make questions of an index, each with the passage that answers it and others, to train an embedder on.",
        config=QuestionsConfig,
        version=QUESTIONS_VERSION,
        needs={"index": "index"},
        makes={"questions": "questions.jsonl"},
        example="questions: {count: 2000}",
        remedy="make again: it quotes the document",
        summary_line=questions_line,
        run=_questions,
        uses_seed=True,
        packages=_packages,
    ),
)
