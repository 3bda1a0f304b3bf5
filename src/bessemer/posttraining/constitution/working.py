"""What `revise` and `ai_preferences` have in common: prompts in lots, whose rows are kept as soon as they are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.policy import Policy, read_policy
from bessemer.core.progress import Progress
from bessemer.posttraining.constitution.answering import Speakers, work_identity
from bessemer.posttraining.constitution.config import PrincipledConfig
from bessemer.posttraining.constitution.prompts import Asked, read_asked
from bessemer.posttraining.finished_rows import FinishedRows, write_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Worked:
    """The rows of all prompts, and those that are of use, at least one: the others have a reason under `dropped`."""

    policy: Policy
    rows: Sequence[Row]
    kept: Sequence[Row]

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows are left out, for each reason."""
        return dict(Counter(row["dropped"] for row in self.rows if row["dropped"]))

    @property
    def dropped(self) -> int:
        """How many rows are left out."""
        return len(self.rows) - len(self.kept)


def work_through(
    config: PrincipledConfig,
    model: Path,
    path: Path,
    make: Callable[[Speakers, Policy, Sequence[Asked], Sequence[int]], list[Row]],
    *,
    description: str,
    unit: str,
    without_any: str,
    internal: Sequence[str],
    seed: int,
    device: str,
    progress: Progress,
    folder: Path,
) -> Worked:
    """Make a row for every prompt of the data and write those of use to `path`; goes on behind the rows that are there.

    make: of the models, the policy, all that is asked and the numbers of a lot, the lot's rows. without_any: the end of the
    error's sentence. internal: what is of no use to those who learn from a row. Raises SourceError for prompts that are
    malformed and where no row is of use, and ConfigError for the policy.
    """
    policy = read_policy(None if config.policy is None else folder / config.policy)
    policy.chosen_principles(config.principles)
    asked = read_asked(config, folder)
    checkpoint = path.parent / ".checkpoints" / path.name
    finished = FinishedRows(checkpoint, work_identity(config, model, asked, policy, folder, seed))
    speakers = Speakers(config, model, folder, device)
    with progress.task(description, total=len(asked), unit="prompts", completed=len(finished)) as bar:
        for start in range(len(finished), len(asked), config.batch_size):
            lot = range(start, min(start + config.batch_size, len(asked)))
            finished.append(make(speakers, policy, asked, lot))
            bar.advance(len(lot))
    worked = Worked(policy, finished.rows, [row for row in finished.rows if not row["dropped"]])
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in worked.reasons.items())
    if not worked.kept:
        raise SourceError(f"none of the {len(asked):,} {without_any}: {reasons}")
    if worked.dropped:
        progress.say(f"  {worked.dropped:,} of {len(asked):,} {unit} are left out: {reasons}")
    write_rows(path, [{name: value for name, value in row.items() if name not in internal} for row in worked.kept])
    return worked
