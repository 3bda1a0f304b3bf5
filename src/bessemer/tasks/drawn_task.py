"""The task of drawn pictures: questions about them with known answers, by kind of question."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from bessemer.core.config import setting
from bessemer.core.hashing import derive_seed
from bessemer.tasks.config import SampledConfig
from bessemer.tasks.drawn import ANSWERS, QUESTIONS, DrawnItem, Question, blank_png, drawn_items
from bessemer.tasks.generate import verified_samples
from bessemer.tasks.questions import GenerationQuestion, GenerationTask, Outcome
from bessemer.tasks.verifiers import Exact


class DrawnPicturesConfig(SampledConfig):
    """Questions about pictures that are drawn from a seed; asked by the model's chat template."""

    kind: Literal["drawn_pictures"] = setting("drawn_pictures", "questions about drawn pictures")
    chat: bool = setting(True, "ask by the model's chat template, which alone has places for pictures")
    items: int = setting(500, "pictures, each with one question", unit="items", ge=1)
    about: list[Question] = setting(
        default_factory=lambda: list(QUESTIONS), description="kinds of questions, asked by turns", min_length=1
    )
    part: Literal["train", "held_out"] = setting(
        "held_out", "pictures to train on, or others; whatever the seed, none is in both"
    )
    side: int = setting(32, "side of a picture", unit="pixels", ge=32, le=512)
    blind: bool = setting(False, "show grey in place of every picture, by which the words of the questions alone are measured")
    max_tokens: int = setting(8, "longest answer", unit="tokens", ge=1)


class DrawnPicturesTask(GenerationTask):
    """`accuracy`, and by kind of question `accuracy_KIND`."""

    def __init__(self, config: DrawnPicturesConfig) -> None:
        self.name = config.name
        self.settings: Mapping[str, Any] = config.output_settings()
        self.begin_token = config.begin_token
        self.generation = config.generation
        self.chance = fmean(1 / len(ANSWERS[kind]) for kind in config.about)
        self._config = config
        self._items: list[DrawnItem] = []

    def questions(self) -> list[GenerationQuestion]:
        config = self._config
        count = min(config.items, config.limit or config.items)
        self._items = drawn_items(count, derive_seed(config.seed, config.part), about=config.about, side=config.side)
        grey = blank_png(config.side)
        return [
            GenerationQuestion(number, self._context(grey if config.blind else item.png, item.question), id=f"picture {number}")
            for number, item in enumerate(self._items)
        ]

    def judge(self, question: GenerationQuestion, texts: Sequence[str]) -> Outcome:
        item = self._items[question.item]
        outcome = verified_samples(Exact(), texts, [item.answer])
        scores = {**outcome.scores, f"accuracy_{item.kind}": outcome.scores["accuracy"]}
        return Outcome(scores, outcome.answer, outcome.chosen, outcome.gold)

    def reference(self, question: GenerationQuestion) -> str:
        return self._items[question.item].answer

    def _context(self, png: bytes, question: str) -> tuple[Mapping[str, Any], ...]:
        config = self._config
        first = "\n\n".join(part for part in (config.system, config.description) if part)
        uri = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        content = [{"type": "image", "image": uri}, {"type": "text", "text": question}]
        return (*([{"role": "system", "content": first}] if first else []), {"role": "user", "content": content})
