"""The stage `sft`, and those of the packages below this one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bessemer.core.records import is_text_file
from bessemer.core.stage import Outside, StageContext, last_of
from bessemer.data.config import CollectConfig, Source
from bessemer.data.corpus.remote import documents_at, documents_of
from bessemer.data.sources.registry import (
    FilesSource,
    HuggingFaceSource,
    PythonDocsSource,
    TablesSource,
    UserSource,
    WheelsSource,
)
from bessemer.posttraining.data.made import (
    CITED,
    DOCS_QUESTIONS,
    PICTURES,
    REVISIONS,
    SYNTHETIC,
    is_data_name,
    made_paths,
    roles,
    unread,
)
from bessemer.posttraining.distillation.specs import STAGES as DISTILLATION_STAGES
from bessemer.posttraining.embedding.specs import STAGES as EMBEDDING_STAGES
from bessemer.posttraining.pictures.specs import STAGES as PICTURE_STAGES
from bessemer.posttraining.preference.specs import STAGES as PREFERENCE_STAGES
from bessemer.posttraining.rewards.specs import STAGES as REWARD_STAGES
from bessemer.posttraining.rl.specs import STAGES as RL_STAGES
from bessemer.posttraining.sft import report
from bessemer.posttraining.sft.config import SFT_VERSION, SFTConfig
from bessemer.posttraining.synthetic.specs import STAGES as SYNTHETIC_STAGES
from bessemer.tokenization.config import TokenizeConfig
from bessemer.training.specs import (
    model_not_merged,
    resolved_by,
    rows_too_long,
    rows_too_long_for_existing,
    training_arguments,
    training_stage,
)

#: Data that earlier stages may make for `sft`.
_MADE = (REVISIONS, SYNTHETIC, CITED, PICTURES)
_OTHER_DATA = "name a file of conversations in sft.data, or leave the stage out with sft: null"


def _sft_conflict(config: SFTConfig, above: Mapping[str, Any]) -> str | None:
    if config.pretraining_share and last_of(above, TokenizeConfig) is None:
        return "pretraining_share mixes in text of the run's tokens, and no stage above makes any; add tokenize"
    return rows_too_long(config, above) if config.has_given_length else None


def _sft_conflict_of_files(config: SFTConfig, above: Mapping[str, Any], folder: Path) -> str | None:
    """The error where `data` names questions from documentation but no source gives documents of functions; plain text and web
    pages do not."""
    too_long = rows_too_long_for_existing(config, above, folder) if config.has_given_length else None
    if too_long is not None:
        return too_long
    collect = last_of(above, CollectConfig)
    if DOCS_QUESTIONS not in config.data or collect is None:
        return None
    if any(_may_document_functions(source, folder) for source in collect.sources):
        return None
    return f"{_NO_QUESTIONS}, and no source gives it; add wheels or python_docs to collect, {_OTHER_DATA}"


_NO_QUESTIONS = f"{DOCS_QUESTIONS} is made from documentation of functions and classes"


def _documents_without_questions(config: SFTConfig, inputs: Mapping[str, Path], cache: Path) -> str | None:
    """As `_sft_conflict_of_files`, decided by the documents themselves."""
    if DOCS_QUESTIONS not in config.data or "documents" not in inputs:
        return None
    from bessemer.data.corpus.reader import TRAIN
    from bessemer.posttraining.synthetic.documentation import has_question

    if has_question(documents_at(inputs["documents"], cache), TRAIN):
        return None
    return f"{_NO_QUESTIONS}, and none is left to learn from; {_OTHER_DATA}"


def _may_document_functions(source: Source, folder: Path) -> bool:
    """Whether documents of a source can have `package` and `qualname` in their metadata."""
    if isinstance(source, FilesSource):
        from bessemer.data.sources.files import may_hold_records

        return may_hold_records(source.paths, folder)
    return isinstance(source, (WheelsSource, PythonDocsSource, UserSource, TablesSource, HuggingFaceSource))


def _sft(context: StageContext, *, only_resolve: bool = False) -> dict[str, Any]:
    from bessemer.posttraining.sft.stage import sft

    return sft(
        context.config,
        context.inputs["model"],
        documents_of(context),
        context.out,
        tokens=context.inputs.get("tokens"),
        made=made_paths(context.inputs),
        only_resolve=only_resolve,
        **training_arguments(context),
    )


def _sft_fingerprint(config: SFTConfig, outside: Outside) -> Any:
    from bessemer.posttraining.data.examples import files_fingerprint

    return files_fingerprint([name for name in config.data if is_data_name(name) or is_text_file(name)], outside.folder)


STAGES = (
    training_stage(
        kind="sft",
        summary="Fine-tune the model on conversations (supervised fine-tuning).",
        config=SFTConfig,
        version=SFT_VERSION,
        needs={"model": "model", "documents": "documents?", "tokens": "tokens?", **roles(_MADE)},
        unread=unread(_MADE),
        makes={"model": "model", "conversations": "conversations"},
        links={"model": "model", "adapter": "adapter"},
        lacks=model_not_merged,
        example="sft: {data: [conversations.jsonl]}",
        budget_seconds=95,
        report=report.report,
        summary_line=report.summary_line,
        next_steps=report.next_steps,
        run=_sft,
        resolve=resolved_by(_sft),
        fingerprint=_sft_fingerprint,
        conflict=_sft_conflict,
        conflict_of_files=_sft_conflict_of_files,
        unusable=_documents_without_questions,
    ),
    *PICTURE_STAGES,
    *SYNTHETIC_STAGES,
    *PREFERENCE_STAGES,
    *REWARD_STAGES,
    *RL_STAGES,
    *DISTILLATION_STAGES,
    *EMBEDDING_STAGES,
)
