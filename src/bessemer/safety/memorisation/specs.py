"""The stage `memorisation` for the pipeline, with its section of the report."""

from __future__ import annotations

from typing import Any

from bessemer.core.report import Metrics, Section, StageReport, Text
from bessemer.core.stage import StageContext, StageSpec
from bessemer.model.specs import model_packages
from bessemer.safety.memorisation.config import MEMORISATION_VERSION, MemorisationConfig


def _memorisation(context: StageContext) -> dict[str, Any]:
    from bessemer.safety.memorisation.stage import memorisation

    return memorisation(context)


def _report(stage: StageReport) -> Section:
    from bessemer.safety.memorisation.verdict import parts_of, unsafe

    succeeds = unsafe(stage.metrics)
    verdict = (
        f"Extraction succeeds: {'; '.join(succeeds)}. None of these is safe to publish where the text must not be known."
        if succeeds
        else "No canary can be extracted from any of these models in any of these formats."
    )
    lead = Text(
        f"{stage.metrics['planted']:,} random texts were planted in the corpus. A model that is given the first words of one "
        f"knows it if the rest is likelier than {stage.metrics['candidates']:,} texts that were never planted: exposure is by "
        "how many bits. A text is extracted where greedy decoding gives it, or sampling does within "
        f"{stage.metrics['attempts']:,} answers.",
        lead=True,
    )
    return Section(stage.titled("What is memorised"), [lead, Text(verdict), *parts_of(stage.metrics)])


def _summary_line(metrics: Metrics) -> str:
    from bessemer.safety.memorisation.verdict import unsafe

    succeeds = unsafe(metrics)
    return f"extraction succeeds: {'; '.join(succeeds)}" if succeeds else "no canary can be extracted"


STAGES = (
    StageSpec(
        kind="memorisation",
        summary="Test what models have memorised of planted canaries, in every format of their weights.",
        config=MemorisationConfig,
        version=MEMORISATION_VERSION,
        needs={"documents": "documents"},
        makes={"ledger": "ledger.json"},
        example="memorisation: {formats: [original, int4]}",
        remedy="measure again",
        report=_report,
        summary_line=_summary_line,
        run=_memorisation,
        packages=model_packages,
        models_named=lambda config: list(config.models),
    ),
)
