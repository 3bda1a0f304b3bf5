"""The stage `revise`: answers of a model, criticised and written anew by principles, to be tuned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.core.policy import Policy
from bessemer.core.progress import Progress, Silent
from bessemer.core.seeds import derive_seed
from bessemer.core.statistics import paired_difference
from bessemer.posttraining.constitution.answering import Speakers, answered
from bessemer.posttraining.constitution.config import ReviseConfig
from bessemer.posttraining.constitution.detectors import Finding, findings
from bessemer.posttraining.constitution.drawing import drawn_principles
from bessemer.posttraining.constitution.prompts import Asked
from bessemer.posttraining.constitution.revision import Revised, revise_answers
from bessemer.posttraining.constitution.working import work_through

#: The file of rows that `sft` reads.
REVISIONS_FILE = "revisions.jsonl"
#: What detectors tell of answers, by the names of metrics. Revisions that babble are left out.
_DETECTED: Mapping[str, Callable[[Finding], bool]] = {
    "hazard": lambda found: found.is_hazard,
    "refusal": lambda found: found.refuses,
}


def revise(
    config: ReviseConfig,
    model: Path,
    out: Path,
    *,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write answers of the model of a folder, revised by a policy's principles; goes on behind the rows in `out`.

    Writes `revisions.jsonl` below `out`: {prompt, completion} with the revision as the completion, and beside it the first
    answer, the principles, the critiques and the critic. Files that the settings name are relative to `folder`. Returns the
    headline metrics: rates that detectors find before and after, with the interval of their difference. Raises SourceError for
    prompts that are malformed and where no answer could be revised, ConfigError for the policy and the critic, ApiError where
    a critic at a URL fails for good.
    """
    worked = work_through(
        config,
        model,
        out / REVISIONS_FILE,
        partial(_revised_rows, config, seed),
        description="revise",
        unit="prompts",
        without_any="answers could be revised",
        internal=("dropped",),
        seed=seed,
        device=device,
        progress=progress or Silent(),
        folder=folder,
    )
    kept = worked.kept
    before, after = (findings([row[name] for row in kept], worked.policy) for name in ("answer", "completion"))
    return {
        "prompts": len(worked.rows),
        "revisions": len(kept),
        "dropped": worked.dropped,
        "reasons": worked.reasons,
        "changed_share": sum(row["answer"] != row["completion"] for row in kept) / len(kept),
        **rates(before, after),
    }


def _revised_rows(
    config: ReviseConfig, seed: int, speakers: Speakers, policy: Policy, asked: Sequence[Asked], rows: Sequence[int]
) -> list[dict[str, Any]]:
    chosen = [asked[row] for row in rows]
    answers = [of_row[0].text for of_row in answered(speakers, chosen, rows, 1, seed)]
    principles = policy.chosen_principles(config.principles)
    found = revise_answers(
        speakers.critic,
        [one.prompt for one in chosen],
        answers,
        [drawn_principles(principles, seed, row, config.rounds) for row in rows],
        principles,
        [derive_seed(seed, "revise", row) for row in rows],
    )
    critic = None if config.critic is None else config.critic.model
    return [_record(one, revised, critic) for one, revised in zip(chosen, found, strict=True)]


def _record(asked: Asked, revised: Revised, critic: str | None) -> dict[str, Any]:
    return {
        "prompt": list(asked.prompt),
        "completion": revised.revision,
        "answer": revised.answer,
        "principles": [one.principle for one in revised.rounds],
        "critiques": [one.critique for one in revised.rounds],
        "critic": critic,
        "dropped": revised.dropped,
    }


def rates(before: Sequence[Finding], after: Sequence[Finding]) -> dict[str, Any]:
    """Shares of answers that detectors find, before and after, and the ends of the 95 % interval of the difference."""
    metrics: dict[str, Any] = {}
    for name, tells in _DETECTED.items():
        first, second = ([float(tells(one)) for one in found] for found in (before, after))
        low, high = paired_difference(second, first).interval(bounds=(-1.0, 1.0))
        metrics |= {
            f"{name}_before_share": sum(first) / len(first),
            f"{name}_after_share": sum(second) / len(second),
            f"{name}_difference_low": low,
            f"{name}_difference_high": high,
        }
    return metrics
