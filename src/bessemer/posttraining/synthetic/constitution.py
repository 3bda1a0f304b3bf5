"""Shared by `revise` and `ai_preferences`: prompts, the model's answers, principles drawn for a row, and the loop over batches
of prompts. A file may already hold answers; the model writes the missing ones. Rows are written as soon as they are made.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bessemer.core.chat_client import ChatModel, CutText
from bessemer.core.errors import SourceError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.policy import Policy, Principle, read_policy
from bessemer.core.progress import Progress
from bessemer.inference.chat import EngineChat
from bessemer.inference.engine import Engine
from bessemer.posttraining.chat_models import chat_models_fingerprint, open_chat_model, place_fingerprint
from bessemer.posttraining.data.examples import RowReader, read_examples
from bessemer.posttraining.data.formats import Message, Turns, as_answered, as_pair, as_prompt
from bessemer.posttraining.data.made import FinishedRows, data_path, write_rows
from bessemer.posttraining.synthetic.config import PrincipledConfig


def drawn_principles(principles: Mapping[str, Principle], seed: int, row: int, count: int) -> list[str]:
    """Names of `count` principles for a row, by their weights, none twice before all have been drawn."""
    draw = random.Random(derive_seed(seed, "principles", row))
    drawn: list[str] = []
    left: list[str] = []
    for _ in range(count):
        left = left or list(principles)
        (name,) = draw.choices(left, [principles[one].weight for one in left])
        left.remove(name)
        drawn.append(name)
    return drawn


_USUAL_COLUMN = "prompt"
#: Columns of conversations, which take precedence over a prompt.
_CONVERSATIONS = ("messages", "conversations")


@dataclass(frozen=True)
class OpenPrompt:
    """A conversation whose next turn is the assistant's, and the data's answers to it: none, one or two."""

    prompt: tuple[Message, ...]
    answers: tuple[str, ...] = ()


def read_prompts(config: PrincipledConfig, folder: Path, progress: Progress | None = None) -> list[OpenPrompt]:
    """The prompts of all files that the settings name, in order. Raises SourceError or ArtefactError, with file and line."""
    parse, reader = (
        partial(as_open_prompt, config.prompt_column),
        RowReader(config.on_bad_row, None if progress is None else progress.say),
    )
    rows = [row for name in config.data for row in read_examples(data_path(name, folder, {}), parse, reader)]
    return rows[: config.limit]


def as_open_prompt(column: str, row: Mapping[str, Any]) -> OpenPrompt:
    """A row of a prompt, of prompt and completion, or of a pair of answers. Raises ValueError or RequestError, in one line.

    column: that of the prompt; the default one may be missing beside answers that contain the prompt, as a pair of whole
    conversations does.
    """
    if column in row or column != _USUAL_COLUMN:
        row = _with_prompt(row, column)
    if "chosen" in row and "rejected" in row:
        pair = as_pair(row)
        return OpenPrompt(as_prompt({"prompt": pair.prompt}), (_said(pair.chosen), _said(pair.rejected)))
    if "completion" in row:
        answered = as_answered(row)
        return OpenPrompt(as_prompt({"prompt": answered.prompt}), (_said(answered.answer),))
    return OpenPrompt(as_prompt(row))


def _with_prompt(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """A row with the column's prompt under the usual name, and without columns of conversations. Raises as `as_prompt`."""
    as_prompt(row, column)
    others = {name: value for name, value in row.items() if name not in (column, *_CONVERSATIONS)}
    return {**others, _USUAL_COLUMN: row[column]}


def _said(answer: Turns) -> str:
    """The text of a single-turn answer."""
    if isinstance(answer, str):
        return answer
    if len(answer) != 1:
        raise ValueError("the answer is of several turns; one turn can be criticised")
    if answer[0].get("tool_calls"):
        raise ValueError("the answer calls tools; one turn of words can be criticised")
    return str(answer[0].get("content") or "")


class Speakers:
    """The model that answers and the one that criticises or compares, which may be the same. Each is opened at its first
    use."""

    def __init__(self, config: PrincipledConfig, model: Path, folder: Path, device: str) -> None:
        self._config = config
        self._model = model
        self._folder = folder
        self._device = device

    @cached_property
    def answering(self) -> ChatModel:
        """The model above. Raises ArtefactError for a damaged one."""
        return EngineChat(self._engine, max_tokens=self._config.max_tokens, temperature=self._config.temperature)

    @cached_property
    def critic(self) -> ChatModel:
        """The critic of the settings, or the model above, greedily. Raises as `open_chat_model`."""
        if self._config.critic is None:
            return EngineChat(self._engine, max_tokens=self._config.max_tokens)
        return open_chat_model(self._config.critic, self._folder, self._device)

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self._model, device=self._device)


@dataclass(frozen=True)
class GivenAnswer:
    """An answer of the data or the model. is_cut: whether the model reached `max_tokens` before it ended."""

    text: str
    is_cut: bool = False


def answered(
    speakers: Speakers, prompts: Sequence[OpenPrompt], rows: Sequence[int], count: int, seed: int
) -> list[list[GivenAnswer]]:
    """`count` answers to each prompt: the data's first, then the model's until there are enough.

    rows: the numbers of the prompts in the whole data, from which their seeds derive.
    """
    missing = [(place, number) for place, one in enumerate(prompts) for number in range(len(one.answers), count)]
    unanswered = [prompts[place].prompt for place, _ in missing]
    seeds = [derive_seed(seed, "answer", rows[place], number) for place, number in missing]
    answers = [[GivenAnswer(text) for text in one.answers[:count]] for one in prompts]
    if missing:
        for (place, _), answer in zip(missing, speakers.answering.ask(unanswered, seeds), strict=True):
            answers[place].append(GivenAnswer(answer.strip(), isinstance(answer, CutText)))
    return answers


def work_identity(
    config: PrincipledConfig, model: Path, prompts: Sequence[OpenPrompt], policy: Policy, folder: Path, seed: int
) -> Any:
    """Everything that the rows of a stage depend on."""
    return {
        "settings": config.output_settings(),
        "model": place_fingerprint(model),
        "critic": chat_models_fingerprint([config.critic], folder),
        "policy": policy.model_dump(mode="json"),
        "data": hash_value([[list(one.prompt), list(one.answers)] for one in prompts]),
        "seed": seed,
    }


Row = dict[str, Any]


@dataclass(frozen=True)
class Worked:
    """The rows of all prompts, and the usable ones, at least one; the others have a reason under `dropped`."""

    policy: Policy
    rows: Sequence[Row]
    kept: Sequence[Row]

    @property
    def reasons(self) -> dict[str, int]:
        """Number of rows left out, by reason."""
        return dict(Counter(row["dropped"] for row in self.rows if row["dropped"]))

    @property
    def dropped(self) -> int:
        """Number of rows left out."""
        return len(self.rows) - len(self.kept)


def work_through(
    config: PrincipledConfig,
    model: Path,
    path: Path,
    make: Callable[[Speakers, Policy, Sequence[OpenPrompt], Sequence[int]], list[Row]],
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
    """Make a row for every prompt of the data and write the usable ones to `path`; continues after existing rows. make: takes
    the models, the policy, all prompts and the numbers of a batch, and returns the batch's rows. without_any: the end of the
    error's sentence if no row is usable. internal: keys that the written file leaves out. Raises SourceError for malformed
    prompts and if no row is usable, ConfigError for the policy.
    """
    policy = read_policy(None if config.policy is None else folder / config.policy)
    policy.chosen_principles(config.principles)
    prompts = read_prompts(config, folder, progress)
    checkpoint = path.parent / ".checkpoints" / path.name
    finished = FinishedRows(checkpoint, work_identity(config, model, prompts, policy, folder, seed))
    speakers = Speakers(config, model, folder, device)
    with progress.task(description, total=len(prompts), unit="prompts", completed=len(finished)) as bar:
        for start in range(len(finished), len(prompts), config.batch_size):
            lot = range(start, min(start + config.batch_size, len(prompts)))
            finished.append(make(speakers, policy, prompts, lot))
            bar.advance(len(lot))
    worked = Worked(policy, finished.rows, [row for row in finished.rows if not row["dropped"]])
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in worked.reasons.items())
    if not worked.kept:
        raise SourceError(f"none of the {len(prompts):,} {without_any}: {reasons}")
    if worked.dropped:
        progress.say(f"  {worked.dropped:,} of {len(prompts):,} {unit} are left out: {reasons}")
    write_rows(path, [{name: value for name, value in row.items() if name not in internal} for row in worked.kept])
    return worked
