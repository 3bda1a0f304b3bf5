"""Answers that a model judges: by a rubric, or beside another answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

from pydantic import model_validator

from bessemer.core.chat_client import ChatClient
from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.records import Record
from bessemer.core.store import follow
from bessemer.tasks.config import SampledConfig, TaskConfig, Template, fill
from bessemer.tasks.file_task import Example, FileTask
from bessemer.tasks.judge import Answered, Ask, Criterion, Pair, PairVerdict, PairwiseJudge, RubricJudge
from bessemer.tasks.questions import GenerationQuestion, GenerationTask, Outcome

#: The headline score of each method.
RUBRIC, WIN_RATE = "rubric", "win_rate"


class JudgeConfig(Config):
    """The judging model: at an OpenAI-compatible URL, or a model's folder on this machine."""

    model: str = setting(description="the model's name at the URL; without a URL a model's folder or GGUF file")
    url: str | None = setting(
        None, "address of the API with its version, such as https://api.example.com/v1; none: `model` is on this machine"
    )
    key_variable: str = setting(
        "", "environment variable that holds the key of the API; empty: it needs none", affects_output=False
    )
    max_tokens: int = setting(512, "longest answer of the judge", unit="tokens", ge=1)
    attempts: int = setting(5, "tries of a request that fails for a reason that may pass", affects_output=False, ge=1)
    timeout: float = setting(120.0, "wait for an answer", unit="seconds", affects_output=False, gt=0)
    workers: int = setting(4, "requests at once", affects_output=False, ge=1)


class CriterionConfig(Config):
    """A criterion: a question about an answer that is answered yes or no."""

    question: str = setting(description="the question", min_length=1)
    weight: float = setting(1.0, "its share of the score, beside the other weights", gt=0)


class JudgedConfig(SampledConfig, TaskConfig):
    """Answers that a model judges."""

    kind: Literal["judged"] = setting("judged", "let a model judge the answers")
    prompt: Template = setting("{prompt}", "the question, with fields in braces")
    judge: JudgeConfig = setting(description="the judging model")
    method: Literal["rubric", "pairwise"] = setting(
        "rubric", "rate each answer, or say which is better: the model's or the one that the data holds"
    )
    criterion: str | None = setting(None, "by what the judge decides, in a sentence; none: by correctness and helpfulness")
    criteria: list[CriterionConfig | str] = setting(
        default_factory=list, description="of a rubric: questions answered yes or no, with weights; none: a rating from 1 to 5"
    )
    reference: str | None = setting(None, "of a rubric: field that holds a right answer, which the judge is shown; none: none")
    other: str = setting("answer", "of pairs: field that holds the answer to compare with")
    joiner: str = setting("\n\n", "text between a question and its answer")
    max_tokens: int = setting(512, "longest answer", unit="tokens", ge=1)

    @model_validator(mode="after")
    def _criteria_are_of_a_rubric(self) -> Self:
        if self.criteria and (self.method == "pairwise" or self.criterion is not None):
            raise ValueError("criteria make a rubric by themselves: leave out `criterion`, and `method: pairwise`")
        return self


class JudgedTask(FileTask[JudgedConfig], GenerationTask):
    """Judged answers over a file."""

    def __init__(self, config: JudgedConfig, folders: list[Path], ask: Ask | None = None) -> None:
        """ask: the judging model. None: that at the settings' URL; without one `connect` gives it before anything is judged.

        Raises ConfigError where the URL or its key is wrong.
        """
        super().__init__(config, folders)
        self.generation = config.generation
        self.judge_config = config.judge
        if config.method == "pairwise":
            for record in self._items:
                record.text(config.other)
        self._ask = chat_client(config.judge).ask if ask is None and config.judge.url is not None else ask

    @property
    def needs_judge(self) -> bool:
        """Whether `connect` has to give the judging model."""
        return self._ask is None

    def connect(self, ask: Ask) -> None:
        """Let this model judge."""
        self._ask = ask

    def questions(self) -> list[GenerationQuestion]:
        return self._generation_questions(
            lambda item, row: self._prompter.context(item, row, fill(self._config.prompt, row), self._example)
        )

    def headline(self, form: str) -> str:
        return RUBRIC if self._config.method == "rubric" else WIN_RATE

    def judge(self, question: GenerationQuestion, texts: Sequence[str]) -> Outcome:
        return self.judge_all([(question, texts)])[0]

    def judge_all(self, answered: Sequence[tuple[GenerationQuestion, Sequence[str]]]) -> list[Outcome]:
        """`rubric`: 0 to 1. Of pairs `win_rate`, ties as half, `consistent`: the share of pairs whose verdict did not change
        with the order, and `first_place`: the share of verdicts for what was shown first, 0.5 without position bias.

        All samples are judged in one call. What cannot be read is counted, and has no score.
        """
        if self._ask is None:
            raise ConfigError(
                f"task {self.name}: nobody has opened its judge, a model on this machine; connect it, or name a url"
            )
        flat = [(self._items[question.item], text) for question, texts in answered for text in texts]
        judged = self._pairs(self._ask, flat) if self._config.method == "pairwise" else self._rubric(self._ask, flat)
        outcomes, start = [], 0
        for _, texts in answered:
            of_item = judged[start : start + len(texts)]
            start += len(texts)
            read = [scores for scores, _ in of_item if scores]
            means = {name: fmean(scores[name] for scores in read) for name in (read[0] if read else ())}
            counts = {"judgements that could not be read": len(texts) - len(read)}
            outcomes.append(Outcome(means, "\n\n".join(texts), [said for _, said in of_item], counts=counts))
        return outcomes

    def _rubric(self, ask: Ask, answers: Sequence[tuple[Record, str]]) -> list[tuple[dict[str, float], Any]]:
        config = self._config
        criteria = [
            Criterion(criterion) if isinstance(criterion, str) else Criterion(criterion.question, criterion.weight)
            for criterion in config.criteria
        ]
        judge = RubricJudge(ask, criteria) if config.criterion is None else RubricJudge(ask, criteria, config.criterion)
        scores = judge.scores(
            [
                Answered(fill(config.prompt, record), text, "" if config.reference is None else record.text(config.reference))
                for record, text in answers
            ]
        )
        return [({} if score is None else {RUBRIC: score}, score) for score in scores]

    def _pairs(self, ask: Ask, answers: Sequence[tuple[Record, str]]) -> list[tuple[dict[str, float], Any]]:
        config = self._config
        judge = PairwiseJudge(ask) if config.criterion is None else PairwiseJudge(ask, config.criterion)
        verdicts = judge.compare(
            [Pair(fill(config.prompt, record), text, record.text(config.other)) for record, text in answers]
        )
        return [(_pair_scores(verdict), list(verdict.orders)) for verdict in verdicts]

    def _example(self, record: Record) -> Example:
        if self._config.reference is None:
            raise ConfigError(f"task {self.name}: examples need answers; name their field with `reference`")
        return Example(fill(self._config.prompt, record), record.text(self._config.reference))


def _pair_scores(verdict: PairVerdict) -> dict[str, float]:
    if verdict.score is None:
        return {}
    return {WIN_RATE: verdict.score, "consistent": float(verdict.consistent), "first_place": verdict.first_place}


def chat_client(config: JudgeConfig, temperature: float = 0.0) -> ChatClient:
    """The client of a judge at a URL. Raises ConfigError where the URL is none, or its key is not set."""
    assert config.url is not None
    return ChatClient(
        config.url,
        config.model,
        key_variable=config.key_variable,
        max_tokens=config.max_tokens,
        temperature=temperature,
        timeout=config.timeout,
        attempts=config.attempts,
        workers=config.workers,
    )


#: Files of a model's folder that decide what it answers; the first is in every such folder.
_CONFIG, _FILES = "config.json", ("*.safetensors", "*.json", "*.jinja")


def model_place(name: str, folder: Path) -> Path:
    """The folder or GGUF file of a model, relative to `folder`; a run's or a stage's folder also names its model. Raises
    ConfigError if there is none."""
    place = Path(os.path.normpath(folder.resolve() / name))
    for folder in (follow(place), follow(place / "model")):
        if (folder.is_file() and folder.suffix == ".gguf") or (folder / _CONFIG).is_file():
            return folder
    raise ConfigError(f"{name}: there is no model's folder and no GGUF file {place}; a model elsewhere has a url")


def place_fingerprint(place: Path) -> dict[str, str]:
    """Hashes of a GGUF file, or of the files of a model's folder."""
    files = [place] if place.is_file() else sorted(path for pattern in _FILES for path in place.glob(pattern))
    return {path.name: hash_file(path) for path in files}


def chat_models_fingerprint(configs: Sequence[JudgeConfig | None], folder: Path) -> list[dict[str, str]]:
    """Hashes of the files of the models on this machine, for a stage's key. Raises as `model_place`."""
    return [
        place_fingerprint(model_place(config.model, folder)) for config in configs if config is not None and config.url is None
    ]
