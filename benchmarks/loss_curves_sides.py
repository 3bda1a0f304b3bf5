"""The two sides of `loss_curves.py`: this package's stages, which write down what each step read, and TRL's trainers, which
read the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from posttraining_data import CONTEXT, Subject, prepare

if TYPE_CHECKING:
    import torch

    from bessemer.training.data.batch import Batch

#: Methods, as a table has them.
METHODS = {
    "sft": "supervised tuning",
    "lora": "LoRA",
    "dpo": "DPO",
    "kto": "KTO",
    "reward": "reward model",
    "grpo": "GRPO, two updates of a rollout",
}
#: Peak learning rates by model.
RATES = {
    "1m": {"sft": 3e-4, "lora": 1e-3, "dpo": 1e-4, "kto": 1e-4, "reward": 1e-4, "grpo": 1e-4},
    "135m": {"sft": 2e-5, "lora": 2e-4, "dpo": 5e-6, "kto": 5e-6, "reward": 1e-5, "grpo": 5e-6},
}
#: Rows of a step, by model; of GRPO completions, of which a prompt has `GROUP`, with at most `ANSWER` tokens.
ROWS, COMPLETIONS = {"1m": 4, "135m": 1}, {"1m": 16, "135m": 8}
GROUP, ANSWER, UPDATES = 4, 16, 2
#: Of the adapter; of DPO and KTO; of the divergence in GRPO, and its clip.
RANK, ALPHA, BETA, KL, CLIP = 16, 32, 0.1, 0.04, 0.2
#: Rows that the examples fill.
_FILLED = 64
SEED, IGNORED = 1, -100
_MODEL_SEED = 5


@dataclass(frozen=True)
class Run:
    """One comparison. work: folder of all; what a run makes lies below it."""

    method: str
    model: str
    steps: int
    threads: int
    work: Path

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"work": str(self.work)}

    @classmethod
    def of_plain(cls, values: dict[str, Any]) -> Self:
        return cls(**values | {"work": Path(values["work"])})

    @property
    def folder(self) -> Path:
        """Where the curves lie, and what each step read."""
        folder = self.work / f"{self.method}-{self.model}-{self.steps}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def steps_file(self) -> Path:
        return self.folder / "steps.json"

    @property
    def rate(self) -> float:
        """The learning rate."""
        return RATES[self.model][self.method]

    def subject(self) -> Subject:
        """The base and the texts, made where they are not there."""
        from bessemer.model.formats import packaged_smollm2

        done = Subject(self.work / f"posttraining-{self.model}")
        if (done.folder / "pairs.json").exists():
            return done
        return prepare(self.model, self.work, _FILLED, packaged_smollm2() if self.model == "135m" else None)

    def base(self) -> Path:
        """The folder that both sides open: of a reward model with a scalar head."""
        model = self.subject().model
        if self.method != "reward":
            return model
        scorer = self.work / f"scorer-{self.model}"
        if not (scorer / "model.safetensors").exists():
            from bessemer.model.storage.folder import load_scorer, save_model

            save_model(load_scorer(model, seed=_MODEL_SEED), scorer, tokenizer=model)
        return scorer


@dataclass(frozen=True)
class Curve:
    """The loss of every step, and the norm of its gradient before it is clipped."""

    losses: list[float]
    norms: list[float]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


# --- this package's stages ----------------------------------------------------------------------------------------


def ours(run: Run) -> Curve:
    """The stage's curve, as `metrics.jsonl` has it; what each step read is written beside it."""
    from bessemer.core.metrics import read_metrics

    out = run.folder / "ours"
    out.mkdir(exist_ok=True)
    run.base()  # made before anything is recorded
    steps: list[Any] = []
    with _recorded(run, steps):
        _STAGES[run.method](run, out)
    run.steps_file.write_text(json.dumps(steps), encoding="utf-8")
    lines = read_metrics(out / "metrics.jsonl")
    return Curve([line["loss"] for line in lines], [line["gradient_norm"] for line in lines])


def _common(run: Run) -> dict[str, Any]:
    return {
        "steps": run.steps,
        "batch_size": ROWS[run.model],
        "context_length": CONTEXT,
        "validation_share": 0,
        "optimizer": "adamw",
        "learning_rate": run.rate,
        "beta2": 0.999,
        "weight_decay": 0.0,
        "warmup_fraction": 0.0,
        "decay_fraction": 0.0,
        "skip_loss_spikes": False,
        "dtype": "float32",
        "compile": False,
        "threads": run.threads,
        "diagnostics_every": 0,
        "checkpoint_minutes": 1000,
    }


def _tuned(run: Run, out: Path) -> None:
    from bessemer.posttraining.sft.config import SFTConfig
    from bessemer.posttraining.sft.stage import sft

    adapter = {"adapter": {"rank": RANK, "alpha": ALPHA, "merge": False}} if run.method == "lora" else {}
    subject = run.subject()
    sft(SFTConfig(data=["examples.jsonl"], **_common(run), **adapter), run.base(), None, out, seed=SEED, folder=subject.folder)


def _preferred(run: Run, out: Path) -> None:
    from bessemer.posttraining.preference.config import PreferenceConfig
    from bessemer.posttraining.preference.stage import preference

    loss = "kto" if run.method == "kto" else "sigmoid"
    config = PreferenceConfig(data=["pairs.jsonl"], loss=loss, beta=BETA, **_common(run))
    preference(config, run.base(), out, seed=SEED, folder=run.subject().folder)


def _ranked(run: Run, out: Path) -> None:
    from bessemer.posttraining.rewards.config import RewardConfig
    from bessemer.posttraining.rewards.stage import reward

    reward(RewardConfig(data=["pairs.jsonl"], **_common(run)), run.base(), out, seed=SEED, folder=run.subject().folder)


def _reinforced(run: Run, out: Path) -> None:
    from bessemer.posttraining.rl.config import RLConfig
    from bessemer.posttraining.rl.stage import rl

    config = RLConfig(
        data=["prompts.jsonl"],
        rewards=["rewards.py:vowels"],
        algorithm="grpo",
        group_size=GROUP,
        max_tokens=ANSWER,
        rollout_epochs=UPDATES,
        clip_low=CLIP,
        clip_high=CLIP,
        beta=KL,
        correction="none",
        **_common(run) | {"batch_size": COMPLETIONS[run.model]},
    )
    rl(config, run.base(), out, seed=SEED, folder=run.subject().folder)


_STAGES: dict[str, Callable[[Run, Path], None]] = {
    "sft": _tuned,
    "lora": _tuned,
    "dpo": _preferred,
    "kto": _preferred,
    "reward": _ranked,
    "grpo": _reinforced,
}


class _recorded:  # noqa: N801
    """While entered, what each step reads is appended to a list: examples, or of GRPO the completions of a rollout."""

    def __init__(self, run: Run, steps: list[Any]) -> None:
        self._examples = _EXAMPLES.get(run.method)
        self._steps = steps

    def __enter__(self) -> None:
        from bessemer.posttraining.rl.policy_sampler import PolicySampler
        from bessemer.training.trainer import Trainer

        examples, steps = self._examples, self._steps
        self._kept = Trainer.step, PolicySampler.groups_of
        take_step, group = self._kept

        def step(trainer: Trainer, batch: Batch, *arguments: Any) -> Any:
            if examples is not None:
                steps.append(list(examples(batch)))
            return take_step(trainer, batch, *arguments)

        def groups_of(sampler: PolicySampler, samples: Any, judgement: Any, size: int) -> Any:
            steps.append(
                [
                    {
                        "prompt": one.prompt.turns,
                        "prompt_ids": list(one.ids[: one.prompt_length]),
                        "completion_ids": list(one.completion_ids),
                        "log_probs": list(one.log_probs),
                        "reward": reward,
                    }
                    for one, reward in zip(samples, judgement.totals, strict=True)
                ]
            )
            return group(sampler, samples, judgement, size)

        Trainer.step, PolicySampler.groups_of = step, groups_of  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        from bessemer.posttraining.rl.policy_sampler import PolicySampler
        from bessemer.training.trainer import Trainer

        Trainer.step, PolicySampler.groups_of = self._kept  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Sequence:
    """A sequence of a packed row. ids: all of its tokens; labels: the same, -100 where nothing is learnt."""

    ids: list[int]
    labels: list[int]

    @property
    def split(self) -> tuple[list[int], list[int]]:
        """Prompt and answer: what is learnt is the end."""
        start = next(place for place, label in enumerate(self.labels) if label != IGNORED)
        return self.ids[:start], self.ids[start:]


def _sequences(batch: Batch) -> Iterator[tuple[int, int, _Sequence]]:
    """(row, number in the row, sequence) of every sequence of a packed batch; what it shares with the one before is its own."""
    assert batch.document_ids_BT is not None and batch.positions_BT is not None
    for row, documents_T in enumerate(batch.document_ids_BT):
        before: list[int] = []
        for number in range(int(documents_T.max())):
            own = documents_T == number + 1
            tokens, targets = batch.tokens_BT[row][own].tolist(), batch.targets_BT[row][own].tolist()
            shared = before[: int(batch.positions_BT[row][own][0])]
            before = [*shared, *tokens]
            yield row, number, _Sequence([*before, targets[-1]], [*[IGNORED] * (len(shared) + 1), *targets])


def _answers(batch: Batch) -> Iterator[dict[str, Any]]:
    for _, _, one in _sequences(batch):
        yield {"input_ids": one.ids, "labels": one.labels}


def _pairs(batch: Batch) -> Iterator[dict[str, Any]]:
    every = [one for _, _, one in _sequences(batch)]
    for chosen, rejected in zip(every[0::2], every[1::2], strict=True):
        (prompt, answer), (same, other) = chosen.split, rejected.split
        assert prompt == same, "both answers are to one prompt"
        yield {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": other}


def _scored_pairs(batch: Batch) -> Iterator[dict[str, Any]]:
    # a reward is read at the last token, which stands among the inputs: the target behind it is none
    every = [one.ids[:-1] for _, _, one in _sequences(batch)]
    for chosen, rejected in zip(every[0::2], every[1::2], strict=True):
        yield {"chosen_ids": chosen, "rejected_ids": rejected}


def _labelled(batch: Batch) -> Iterator[dict[str, Any]]:
    from bessemer.posttraining.data.packing import mismatched

    for (row, number, own), (_, _, twin) in zip(_sequences(batch), _sequences(mismatched(batch)), strict=True):
        (prompt, answer), (_, other) = own.split, twin.split
        label = bool(batch.per_sequence["is_desirable"][row, number])
        yield {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": label}


_EXAMPLES: dict[str, Callable[[Batch], Iterator[dict[str, Any]]]] = {
    "sft": _answers,
    "lora": _answers,
    "dpo": _pairs,
    "kto": _labelled,
    "reward": _scored_pairs,
}


# --- TRL's trainers -----------------------------------------------------------------------------------------------


def theirs(run: Run) -> Curve:
    """The trainer's curve over the steps that ours has written down."""
    import datasets
    import torch
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(run.threads)
    steps = json.loads(run.steps_file.read_text(encoding="utf-8"))
    trainer = _TRAINERS[run.method](run, steps)
    losses: list[float] = []
    step = trainer.training_step

    def kept(*arguments: Any, **named: Any) -> torch.Tensor:
        loss: torch.Tensor = step(*arguments, **named)
        losses.append(float(loss))
        return loss

    trainer.training_step = kept
    trainer.train()
    norms = [float(line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]
    assert len(losses) == len(norms) == run.steps, (len(losses), len(norms))
    return Curve(losses, norms)


def _arguments(run: Run, batch_size: int = 1) -> dict[str, Any]:
    return {
        "output_dir": str(run.folder / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": batch_size,
        "max_steps": run.steps,
        "logging_steps": 1,
        "learning_rate": run.rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "max_grad_norm": 1.0,
        "seed": SEED,
    }


def _language_model(run: Run) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run.base(), dtype=torch.float32, attn_implementation="sdpa")


def _tokenizer(run: Run) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.base())
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _fixed(trainer: Any, steps: Sequence[Sequence[dict[str, Any]]]) -> Any:
    """The trainer with the examples of each step in place of its own order."""
    from torch.utils.data import DataLoader

    rows = list(chain.from_iterable(steps))
    starts = [sum(map(len, steps[:number])) for number in range(len(steps))]
    places = [list(range(start, start + len(step))) for start, step in zip(starts, steps, strict=True)]
    loader: Any = DataLoader(rows, batch_sampler=places, collate_fn=trainer.data_collator)  # type: ignore[arg-type]
    trainer.get_train_dataloader = lambda: loader
    return trainer


def _sft_trainer(run: Run, steps: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = _language_model(run)
    if run.method == "lora":
        model = _with_adapter(run, model)
    return _fixed(
        SFTTrainer(
            model=model,
            args=SFTConfig(**_arguments(run), max_length=CONTEXT + 1),
            train_dataset=Dataset.from_list(steps[0]),
            processing_class=_tokenizer(run),
        ),
        steps,
    )


def _with_adapter(run: Run, model: Any) -> Any:
    """The model with the adapter that ours begins with, by `peft`."""
    from peft import PeftModel

    from bessemer.model.adapters.folder import write_adapter
    from bessemer.model.adapters.trained import adapter_of
    from bessemer.model.storage.folder import load_model
    from bessemer.training.config_parts import AdapterConfig
    from bessemer.training.starting_model import StartingModel

    adapter = AdapterConfig(rank=RANK, alpha=ALPHA)
    begun = StartingModel(run.base(), adapter, scores=False, dtype="float32", seed=SEED).whole("cpu")
    write_adapter(adapter_of(begun), load_model(run.base()), run.folder / "adapter")
    return PeftModel.from_pretrained(model, run.folder / "adapter", is_trainable=True)


def _texts(run: Run) -> list[dict[str, str]]:
    """Rows that a trainer is built with; it reads others."""
    return run.subject().texts_of_pairs()[:2]


def _dpo_trainer(run: Run, steps: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    return _fixed(
        DPOTrainer(
            model=_language_model(run),
            ref_model=_language_model(run),
            args=DPOConfig(**_arguments(run), beta=BETA, max_length=CONTEXT + 1),
            train_dataset=Dataset.from_list(_texts(run)),
            processing_class=_tokenizer(run),
        ),
        steps,
    )


def _kto_trainer(run: Run, steps: Any) -> Any:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": one["prompt"], "completion": one["chosen"], "label": place == 0} for place, one in enumerate(_texts(run))
    ]
    return _fixed(
        KTOTrainer(
            model=_language_model(run),
            ref_model=_language_model(run),
            args=KTOConfig(**_arguments(run, batch_size=2), beta=BETA, max_length=CONTEXT + 1),
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(run),
        ),
        steps,
    )


def _reward_trainer(run: Run, steps: Any) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    # TRL reads the reward at the last token that is no padding, and would pass over an end token that pads too: what pads is a
    # token that no example has. `Trainer` gives the model the tokenizer's when it begins, so it is the tokenizer's.
    used = {token for step in steps for one in step for ids in one.values() for token in ids}
    tokenizer = _tokenizer(run)
    unused = next(token for token in reversed(range(len(tokenizer))) if token not in used)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(unused)
    model = AutoModelForSequenceClassification.from_pretrained(run.base(), dtype=torch.float32, num_labels=1)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**_arguments(run), max_length=CONTEXT + 1),
        train_dataset=Dataset.from_list(_texts(run)),
        processing_class=tokenizer,
    )
    return _fixed(trainer, steps)


def _grpo_trainer(run: Run, rollouts: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    needed = rollouts[: math.ceil(run.steps / UPDATES)]
    at = iter(needed)
    current: list[dict[str, Any]] = []

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        current[:] = next(at)
        assert prompts == [one["prompt"] for one in current], "the sides read other prompts"
        return {
            "prompt_ids": [one["prompt_ids"] for one in current],
            "completion_ids": [one["completion_ids"] for one in current],
            "logprobs": [one["log_probs"] for one in current],
        }

    def reward(completions: list[str], **others: Any) -> list[float]:
        return [one["reward"] for one in current]

    prompts = [one["prompt"] for step in needed for one in step[::GROUP]]
    arguments = GRPOConfig(
        **_arguments(run, COMPLETIONS[run.model]),
        num_generations=GROUP,
        max_completion_length=ANSWER,
        num_iterations=UPDATES,
        steps_per_generation=1,
        shuffle_dataset=False,
        beta=KL,
        epsilon=CLIP,
        loss_type="grpo",
        scale_rewards="group",
        use_bias_correction_kl=False,
    )
    return GRPOTrainer(
        model=_language_model(run),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=_tokenizer(run),
        rollout_func=rollout,
    )


_TRAINERS: dict[str, Callable[[Run, Any], Any]] = {
    "sft": _sft_trainer,
    "lora": _sft_trainer,
    "dpo": _dpo_trainer,
    "kto": _kto_trainer,
    "reward": _reward_trainer,
    "grpo": _grpo_trainer,
}

SIDES: dict[str, Callable[[Run], Curve]] = {"bessemer": ours, "trl": theirs}
