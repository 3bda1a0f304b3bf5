"""The two sides of `posttraining.py`, each in a process of its own: this package's stages, and TRL's trainers.

A side trains from the same files with the settings that it is given, and says when each step ended. On either side that is a
whole run of a user's, without what it writes at its end.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from posttraining_data import CONTEXT, Subject

#: Completions of a step, of a prompt, and tokens of a completion.
BATCH, GROUP, ANSWER = 64, 8, 32
#: Steps before the clock starts, and after.
WARM_STEPS, STEPS = 3, 10
#: Of the adapter, on all linear layers but the head.
RANK, ALPHA = 16, 32
#: Of DPO.
BETA = 0.1
SEED = 1
#: Examples, and prompts, whose log-probabilities are compared.
COMPARED, COMPARED_PROMPTS = 32, 4


@dataclass(frozen=True)
class Job:
    """What is trained: `grpo`, `sft`, `lora` or `dpo`; of the latter three, rows a step, steps of a pass, and passes."""

    method: str
    rows: int = 0
    steps: int = 0
    passes: int = 2


class Ours:
    """The stages `rl`, `sft` and `preference`, as a recipe runs them."""

    #: What is tried beside the defaults, in turn.
    ALTERNATIVES: ClassVar[dict[str, dict[str, tuple[Any, ...]]]] = {
        "grpo": {},
        "sft": {"compile": (True,)},
        "lora": {"compile": (True,)},
        "dpo": {"compile": (True,)},
    }
    DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = {
        "grpo": {},
        "sft": {"compile": False},
        "lora": {"compile": False},
        "dpo": {"compile": False},
    }

    def __init__(self, subject: Subject, job: Job, threads: int) -> None:
        self._subject, self._job, self._threads = subject, job, threads

    def run(self, settings: dict[str, Any]) -> dict[str, float]:
        """Rates by what is counted: `completions` (in rollouts alone), `samples`, `targets` or `pairs` a second; and the mean
        loss."""
        methods = {"grpo": self._grpo, "dpo": self._prefer}
        with tempfile.TemporaryDirectory() as out:
            return methods.get(self._job.method, self._tune)(Path(out), settings)

    def scored(self) -> list[dict[str, Any]]:
        """Sequences, the first of their tokens that has a log-probability, and these, by the weights before training: of
        completions by the engine that sampled them, of answers by the trainer."""
        return self._sampled() if self._job.method == "grpo" else self._answers()

    def _grpo(self, out: Path, settings: dict[str, Any]) -> dict[str, float]:
        from bessemer.core.metrics import read_metrics
        from bessemer.posttraining.rl.config import RLConfig
        from bessemer.posttraining.rl.stage import rl

        config = RLConfig(
            data=["prompts.jsonl"],
            validation_share=0,
            rewards=["rewards.py:vowels"],
            algorithm="grpo",
            steps=WARM_STEPS + STEPS,
            batch_size=BATCH,
            group_size=GROUP,
            max_tokens=ANSWER,
            context_length=128,
            learning_rate=1e-6,
            threads=self._threads,
            diagnostics_every=0,
            checkpoint_minutes=60,
        )
        clock = Clock()
        rl(config, self._subject.model, out, seed=SEED, progress=clock, folder=self._subject.folder)
        lines = read_metrics(out / "metrics.jsonl")[WARM_STEPS:]
        _check_lengths(line["completion_tokens"] for line in lines)
        return {
            "completions": BATCH * STEPS / sum(line["rollout_seconds"] for line in lines),
            "samples": BATCH * STEPS / (clock.times[-1] - clock.times[WARM_STEPS - 1]),
        }

    def _tune(self, out: Path, settings: dict[str, Any]) -> dict[str, float]:
        from bessemer.core.metrics import read_metrics
        from bessemer.posttraining.sft.config import SFTConfig
        from bessemer.posttraining.sft.stage import sft

        clock = Clock()
        config = SFTConfig(**self._sft_settings(), **settings)
        sft(config, self._subject.model, None, out, seed=SEED, progress=clock, folder=self._subject.folder)
        losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
        return _rates_of_passes(clock.times, {"targets": self._subject.targets}, losses, self._job.passes)

    def _prefer(self, out: Path, settings: dict[str, Any]) -> dict[str, float]:
        from bessemer.core.metrics import read_metrics
        from bessemer.posttraining.preference.config import PreferenceConfig
        from bessemer.posttraining.preference.stage import preference

        clock = Clock()
        config = PreferenceConfig(**(self._sft_settings() | {"data": ["pairs.jsonl"], "beta": BETA}), **settings)
        preference(config, self._subject.model, out, seed=SEED, progress=clock, folder=self._subject.folder)
        losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
        return _rates_of_passes(clock.times, {"pairs": len(self._subject.pairs())}, losses, self._job.passes)

    def _sft_settings(self) -> dict[str, Any]:
        adapter = {"adapter": {"rank": RANK, "alpha": ALPHA, "merge": False}} if self._job.method == "lora" else {}
        return adapter | {
            "data": ["examples.jsonl"],
            "validation_share": 0,
            "epochs": self._job.passes,
            "batch_size": self._job.rows,
            "context_length": CONTEXT,
            "optimizer": "adamw",
            "learning_rate": 1e-5,
            "dtype": "float32",
            "threads": self._threads,
            "diagnostics_every": 0,
            "checkpoint_minutes": 60,
        }

    def _sampled(self) -> list[dict[str, Any]]:
        from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
        from bessemer.model.storage.folder import load_model
        from bessemer.tokenization.tokenizer import load_tokenizer

        folder = self._subject.model
        engine = Engine(
            load_model(folder), load_tokenizer(folder), config=EngineConfig(threads=self._threads, cpu_kernels="on")
        )
        prompts = self._subject.prompts()[:COMPARED_PROMPTS]
        found = engine.rollouts(prompts, GROUP, SamplingParams(temperature=1, max_tokens=ANSWER, seed=SEED))
        return [
            {
                "ids": found.tokens[row, :end].tolist(),
                "first": first,
                "log_probs": found.log_probs[row, first:end].tolist(),
            }
            for row, (first, end) in enumerate(zip(found.prompt_lengths.tolist(), found.lengths.tolist(), strict=True))
        ]

    def _answers(self) -> list[dict[str, Any]]:
        import torch

        from bessemer.posttraining.data.examples import read_conversations
        from bessemer.posttraining.data.packing import pack_conversations
        from bessemer.posttraining.sft.config import SFTConfig
        from bessemer.tokenization.tokenizer import load_tokenizer
        from bessemer.training.model_roles import POLICY, ModelRoles
        from bessemer.training.model_setup import PreparedModel
        from bessemer.training.runtime import Runtime
        from bessemer.training.starting_model import StartingModel

        config = SFTConfig(**self._sft_settings(), compile=False)
        runtime = Runtime.of(config, torch.device("cpu"))
        model = StartingModel.of(self._subject.model, config, SEED).whole("cpu")
        conversations = read_conversations(self._subject.folder / "examples.jsonl")[:COMPARED]
        batch = pack_conversations(conversations, load_tokenizer(self._subject.model), CONTEXT).batch
        with torch.no_grad(), runtime.running():
            log_probs_BT = ModelRoles({POLICY: PreparedModel(model, None)}, runtime).log_probs(batch, POLICY)
        assert batch.document_ids_BT is not None
        found = []
        for row, documents in enumerate(batch.document_ids_BT):
            for document in range(1, int(documents.max()) + 1):
                own = documents == document
                tokens, targets = batch.tokens_BT[row][own].tolist(), batch.targets_BT[row][own]
                is_target = targets >= 0
                found.append(
                    {
                        "ids": [*tokens, int(targets[-1])],
                        "first": 1 + int(is_target.int().argmax()),
                        "log_probs": log_probs_BT[row][own][is_target].tolist(),
                    }
                )
        return found


class TRL:
    """TRL's trainers on the same folder."""

    #: What is tried beside the defaults, one setting after the other.
    ALTERNATIVES: ClassVar[dict[str, dict[str, tuple[Any, ...]]]] = {
        "grpo": {
            "attention": ("eager",),
            "cache": ("static",),
            "continuous": (True,),
            "accumulated": (2,),
            "compile": (True,),
            "threads": (1,),
        },
        "dpo": {"accumulated": (2, 4, 8), "precomputed": (False,), "attention": ("eager",), "compile": (True,)},
        "sft": {
            "rows": ("padded, by length", "packed"),
            "accumulated": (2, 4, "each"),
            "attention": ("eager",),
            "compile": (True,),
        },
    }
    ALTERNATIVES["lora"] = ALTERNATIVES["sft"]
    _COMMON: ClassVar[dict[str, Any]] = {"attention": "sdpa", "accumulated": 1, "compile": False}
    DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = {
        "grpo": {**_COMMON, "cache": None, "continuous": False, "threads": None},
        "sft": {**_COMMON, "rows": "padded"},
        "lora": {**_COMMON, "rows": "padded"},
        "dpo": {**_COMMON, "precomputed": True},
    }

    def __init__(self, subject: Subject, job: Job, threads: int) -> None:
        import datasets
        import torch
        import transformers

        self._subject, self._job, self._threads = subject, job, threads
        datasets.disable_progress_bars()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)

    def run(self, settings: dict[str, Any]) -> dict[str, float]:
        """As `Ours.run`."""
        import torch

        torch.set_num_threads(settings.get("threads") or self._threads)
        try:
            with tempfile.TemporaryDirectory() as out:
                methods = {"grpo": self._grpo, "dpo": self._prefer}
                return methods.get(self._job.method, self._tune)(out, settings)
        finally:
            torch.set_num_threads(self._threads)
            torch.compiler.reset()
            gc.collect()

    def log_probs(self, scored: list[dict[str, Any]]) -> list[list[float]]:
        """What `Ours.scored` gives, by the model that TRL trains."""
        import torch

        model = self._model("sdpa").eval()
        if self._job.method == "grpo":
            prompts = self._tokenizer()(self._subject.prompts()[:COMPARED_PROMPTS])["input_ids"]
            assert prompts == [one["ids"][: one["first"]] for one in scored[::GROUP]], "the sides read other prompts"
        found = []
        with torch.no_grad():
            for one in scored:
                ids_T = torch.tensor(one["ids"])
                log_probs_TV = model(ids_T[None]).logits[0, :-1].log_softmax(-1)
                found.append(log_probs_TV.gather(1, ids_T[1:, None])[one["first"] - 1 :, 0].tolist())
        return found

    def _model(self, attention: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self._subject.model, dtype=torch.float32, attn_implementation=attention)

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._subject.model, padding_side="left")

    def _arguments(self, out: str, settings: dict[str, Any]) -> dict[str, Any]:
        return {
            "output_dir": out,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "lr_scheduler_type": "constant",
            "seed": SEED,
            "torch_compile": settings["compile"],
        }

    def _grpo(self, out: str, settings: dict[str, Any]) -> dict[str, float]:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        micro_batches = settings["accumulated"]
        arguments = GRPOConfig(
            **self._arguments(out, settings),
            per_device_train_batch_size=BATCH // micro_batches,
            gradient_accumulation_steps=micro_batches,
            num_generations=GROUP,
            max_completion_length=ANSWER,
            max_steps=WARM_STEPS + STEPS,
            learning_rate=1e-6,
            beta=0.0,
            loss_type="grpo",
            cache_implementation=settings["cache"],
            use_transformers_continuous_batching=settings["continuous"],
        )
        texts = self._subject.prompts()
        rewards: dict[str, Any] = {}
        exec((self._subject.folder / "rewards.py").read_text(encoding="utf-8"), rewards)
        clock = _callback()
        trainer = GRPOTrainer(
            model=self._model(settings["attention"]),
            reward_funcs=rewards["vowels"],
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=self._tokenizer(),
            callbacks=[clock],
        )
        seconds: list[float] = []
        lengths: list[float] = []
        generate = trainer._generate

        def timed(prompts: list[Any]) -> Any:
            start = time.perf_counter()
            found = generate(prompts)
            seconds.append(time.perf_counter() - start)
            lengths.append(sum(map(len, found[1])) / len(found[1]))
            return found

        trainer._generate = timed
        trainer.train()
        _check_lengths(lengths)
        return {
            "completions": BATCH * STEPS / sum(seconds[-STEPS:]),
            "samples": BATCH * STEPS / (clock.times[-1] - clock.times[WARM_STEPS - 1]),
        }

    def _tune(self, out: str, settings: dict[str, Any]) -> dict[str, float]:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        examples, is_packed = self._subject.examples(), settings["rows"] == "packed"
        # as many updates as ours: of as many rows, or, unpacked, of as many examples
        each = self._job.rows if is_packed else -(-len(examples) // self._job.steps)
        micro_batches = each if settings["accumulated"] == "each" else settings["accumulated"]
        arguments = SFTConfig(
            **self._arguments(out, settings),
            per_device_train_batch_size=-(-each // micro_batches),
            gradient_accumulation_steps=micro_batches,
            num_train_epochs=self._job.passes,
            learning_rate=1e-5,
            max_length=CONTEXT,
            packing=is_packed,
            train_sampling_strategy="group_by_length" if "by length" in settings["rows"] else "random",
        )
        adapter = {}
        if self._job.method == "lora":
            adapter["peft_config"] = LoraConfig(
                r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
            )
        clock = _callback()
        trainer = SFTTrainer(
            model=self._model(settings["attention"]),
            args=arguments,
            train_dataset=Dataset.from_list(examples),
            processing_class=self._tokenizer(),
            callbacks=[clock],
            **adapter,
        )
        loss = trainer.train().training_loss
        return _rates_of_passes(clock.times, {"targets": self._subject.targets}, [loss], self._job.passes)

    def _prefer(self, out: str, settings: dict[str, Any]) -> dict[str, float]:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        pairs = self._subject.texts_of_pairs()
        each = -(-len(pairs) // self._job.steps)
        arguments = DPOConfig(
            **self._arguments(out, settings),
            per_device_train_batch_size=-(-each // settings["accumulated"]),
            gradient_accumulation_steps=settings["accumulated"],
            precompute_ref_log_probs=settings["precomputed"],
            num_train_epochs=self._job.passes,
            learning_rate=1e-5,
            beta=BETA,
            max_length=CONTEXT,
        )
        clock = _callback()
        trainer = DPOTrainer(
            model=self._model(settings["attention"]),
            args=arguments,
            train_dataset=Dataset.from_list(pairs),
            processing_class=self._tokenizer(),
            callbacks=[clock],
        )
        read = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in trainer.train_dataset]
        assert read == self._subject.pairs(), "the sides read other pairs"
        loss = trainer.train().training_loss
        return _rates_of_passes(clock.times, {"pairs": len(pairs)}, [loss], self._job.passes)


def _rates_of_passes(times: list[float], counted: dict[str, int], losses: list[float], passes: int) -> dict[str, float]:
    """Of the last of several passes over all examples; of a single one, without its first step. counted: of a pass, by name."""
    updates = len(times) // passes
    seconds = times[-1] - times[max(0, updates * (passes - 1) - 1)]
    rates = {name: number / seconds for name, number in counted.items()}
    return {**rates, "loss": sum(losses) / len(losses), "updates": updates}


def _check_lengths(lengths: Any) -> None:
    """The model never ends of itself: completions of either side have all their tokens."""
    shortest = min(lengths)
    assert shortest > 0.98 * ANSWER, f"completions of {shortest:.1f} tokens"


class _Task:
    def __init__(self, times: list[float]) -> None:
        self._times = times

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        pass

    def reach(self, completed: float, note: str | None = None) -> None:
        self._times.append(time.perf_counter())


class Clock:
    """A `Progress` that notes when each training step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def say(self, line: str) -> None:
        """Nothing."""

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "", completed: float = 0) -> Iterator[_Task]:
        """Those of steps are noted."""
        yield _Task(self.times if unit == "steps" else [])


def _callback() -> Any:
    from transformers import TrainerCallback

    class StepEnds(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            self.times.append(time.perf_counter())

    return StepEnds()


SIDES: dict[str, Callable[[Subject, Job, int], Ours | TRL]] = {"bessemer": Ours, "trl": TRL}


def work_off(kind: str, subject: Subject, job: Job, threads: int) -> None:
    """A process's life: a line of JSON for each that is asked. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = SIDES[kind](subject, job, threads)
    for line in sys.stdin:
        verb, given = json.loads(line)
        try:
            answer: Any = getattr(side, verb)(*given)
        except Exception as error:
            # one of the peer's settings may not work here: which, the result says
            answer = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
        print(json.dumps(answer), file=answers, flush=True)
