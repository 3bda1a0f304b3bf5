"""A small graph of quick stages, so that the runner's own promises are tested without a model."""

from pathlib import Path

import pytest

from bessemer.core.config import Config, setting
from bessemer.core.errors import SourceError, StaleMeasurementError
from bessemer.core.stage import StageSpec
from bessemer.pipeline import recipe as recipe_module

_STAGES = "words: [a, b, c]\ncount: {times: 2}\ntrain: {minutes: 0.05}\n"


class WordsConfig(Config):
    shorthand = "words"
    words: list[str] = setting(description="Words.", default_factory=lambda: ["a", "b"])
    workers: int = setting(1, "Workers.", affects_output=False)


class CountConfig(Config):
    times: int = setting(1, "Times.", ge=1)
    function: str | None = setting(None, "file.py:function.", code=True)


class TrainConfig(Config):
    minutes: float | None = setting(None, "Minutes.")
    steps: int | None = setting(None, "Steps.")
    rows: int = setting(1, "Rows at a time.", affects_output=False)

    @property
    def resolved(self) -> bool:
        return self.steps is not None


class Calls(list):
    """The stages that ran, in order; the `rows` that training was told; the machine's speed, measured and real."""

    def __init__(self):
        self.rows = []
        self.measured_speed = self.speed = 1


@pytest.fixture
def calls(monkeypatch) -> Calls:
    calls = Calls()

    def words(work):
        calls.append("words")
        if "bad" in work.config.words:
            (work.out / "half.txt").write_text("half", encoding="utf-8")
            raise SourceError("words: 'bad' is not usable")
        (work.out / "documents").mkdir()
        (work.out / "documents" / "words.txt").write_text(" ".join(work.config.words), encoding="utf-8")
        return {"documents": len(work.config.words)}

    def count(work):
        calls.append("count")
        text = (work.inputs["documents"] / "words.txt").read_text(encoding="utf-8")
        (work.out / "count.txt").write_text(str(len(text.split()) * work.config.times), encoding="utf-8")
        return {"count": len(text.split()) * work.config.times}

    def resolve(work):
        calls.append("resolve")
        steps = int(work.config.minutes * 100 * calls.measured_speed)
        return work.config.with_changes(steps=steps, minutes=None), {"tokens_per_second": 5 * calls.measured_speed}

    def train(work):
        calls.append("train")
        calls.rows.append(work.config.rows)
        checkpoint = work.out / "checkpoints" / "step"
        start = int(checkpoint.read_text(encoding="utf-8")) if checkpoint.exists() else 0
        calls.append(f"from {start}")
        checkpoint.parent.mkdir(exist_ok=True)
        for step in range(start, work.config.steps):
            checkpoint.write_text(str(step + 1), encoding="utf-8")
            if work.measured is not None and work.measured["tokens_per_second"] != 5 * calls.speed:
                calls.measured_speed = calls.speed
                raise StaleMeasurementError("a step takes 3 times less")
            if step + 1 == getattr(calls, "stop_at", None):
                calls.stop_at = None
                raise KeyboardInterrupt
        (work.out / "model").mkdir()
        (work.out / "model" / "weights.txt").write_text(f"{work.config.steps} {work.seed}", encoding="utf-8")
        return {"loss": 1.0}

    specs = {
        spec.kind: spec
        for spec in (
            StageSpec("words", "Write words.", WordsConfig, 1, {}, {"documents": "documents"}, words, {"corpus": "."}),
            StageSpec("count", "Count words.", CountConfig, 1, {"documents": "documents"}, {"counts": "."}, count),
            StageSpec(
                "train",
                "Train on the count.",
                TrainConfig,
                1,
                {"counts": "counts"},
                {"model": "model"},
                train,
                {"model": "model"},
                uses_seed=True,
                resumes=True,
                trains=True,
                resolve=resolve,
            ),
        )
    }
    monkeypatch.setattr(recipe_module, "STAGES", specs)
    return calls


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(folder: Path, calls: Calls):
    """Writes recipe.yaml and returns its name."""

    def write(text: str = _STAGES, head: str = "format: 1\nname: small\n"):
        (folder / "recipe.yaml").write_text(head + text, encoding="utf-8")
        return "recipe.yaml"

    return write
