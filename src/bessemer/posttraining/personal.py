"""An adapter of one user, trained from what they preferred, put to use only where it is better on feedback it never saw.

A person's folder holds all that is kept of them:

    pairs.jsonl          their feedback: {prompt, chosen, rejected}, as the chat page writes it
    adapter/             the adapter in use (PEFT's folder)
    previous/            the one before it
    history.jsonl        a line for each attempt: pairs, held-out results, and what was decided

Whose feedback is held out is decided by a hash of its prompt, so a pair that was held out once is never trained on later. An
attempt trains by DPO beside the person's adapter, in a folder that is removed afterwards. It is put to use where it prefers
what the person preferred more often than the base model, by `least_gain`, and not less often than the adapter in use. The base
is never changed: nobody else's answers can be.
"""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bessemer.core.config import Config, setting
from bessemer.core.errors import ArtefactError
from bessemer.core.progress import Progress, Silent
from bessemer.core.statistics import paired_difference
from bessemer.core.store import locked_folder, write_text
from bessemer.model.adapters import Adapter, adapted
from bessemer.model.adapters.folder import read_adapter
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.data.encoding import encode_answer
from bessemer.posttraining.data.examples import RowReader, prompt_key, read_examples
from bessemer.posttraining.data.formats import Pair, as_pair
from bessemer.posttraining.data.packing import EncodedExample
from bessemer.posttraining.data.turns import RowError
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.stage import preference
from bessemer.posttraining.sft.finetune import conversation_losses
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

PAIRS, HISTORY, ADAPTER, PREVIOUS = "pairs.jsonl", "history.jsonl", "adapter", "previous"
_ATTEMPT = ".attempt"
Decision = Literal["used", "rolled back", "waits"]


class PersonalConfig(Config):
    """How a person's adapter is trained, and when it is put to use."""

    rank: int = setting(8, "rank of the adapter", ge=1, le=256)
    epochs: float = setting(4.0, "passes over the feedback", gt=0)
    steps: int | None = setting(None, "optimizer steps, in place of epochs", ge=1)
    minutes: float | None = setting(None, "longest time of the training", unit="minutes", gt=0)
    learning_rate: float = setting(2e-4, "peak learning rate", gt=0)
    beta: float = setting(0.1, "how strongly the answers are held to the base model's", gt=0)
    batch_size: int = setting(4, "rows of a step", ge=1)
    context_length: int = setting(1024, "tokens of a row, which holds both answers", gt=1)
    held_out: float = setting(0.25, "share of the prompts whose feedback is held out", gt=0, lt=1)
    least_pairs: int = setting(16, "pairs to train on, below which nothing is trained", ge=1)
    least_held_out: int = setting(6, "held-out pairs, below which nothing is trained", ge=2)
    least_gain: float = setting(0.1, "share of held-out pairs by which an adapter must gain over the base model", ge=0, le=1)


class HeldOut(NamedTuple):
    """Held-out pairs: for each whether its chosen answer is likelier a token than the other, by the base model, the adapter in
    use (None: there is none) and the new one."""

    base_N: np.ndarray
    used_N: np.ndarray | None
    new_N: np.ndarray


def personalise(
    base: Path,
    person: Path,
    config: PersonalConfig | None = None,
    *,
    seed: int = 7,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a person's adapter on their feedback, test it, and put it to use or not; returns the line of the history.

    base: a model's folder. Raises SourceError for feedback that cannot be read, ArtefactError while another process works on
    this person, and what training raises; then nothing is changed.
    """
    config, progress = config or PersonalConfig(), progress or Silent()
    if not (person / PAIRS).is_file():
        raise ArtefactError(f"{person}: there is no feedback in it ({PAIRS}, rows of prompt, chosen and rejected)")
    with locked_folder(person):
        started = time.perf_counter()
        pairs = read_examples(person / PAIRS, as_pair, RowReader("skip", progress.say))
        held_out = [pair for pair in pairs if is_held_out(pair, config.held_out)]
        training = [pair for pair in pairs if not is_held_out(pair, config.held_out)]
        line: dict[str, Any] = {"time": time.time(), "pairs": len(training), "held_out": len(held_out), "decision": "waits"}
        if len(training) < config.least_pairs or len(held_out) < config.least_held_out:
            return _noted(person, line | {"reason": "too little feedback"})
        attempt = person / _ATTEMPT
        shutil.rmtree(attempt, ignore_errors=True)
        try:
            _train(base, training, attempt, config, seed=seed, device=device, progress=progress)
            results = _tested(base, person, attempt / ADAPTER, held_out, device, progress)
            decision, reason = decided(results, config.least_gain)
            if decision == "used":
                _put_to_use(attempt / ADAPTER, person)
        finally:
            shutil.rmtree(attempt, ignore_errors=True)
        gain = paired_difference(results.new_N, results.base_N)
        low, high = gain.interval(bounds=(-1.0, 1.0))
        figures = {
            "base": float(results.base_N.mean()),
            "new": float(results.new_N.mean()),
            **({} if results.used_N is None else {"in_use": float(results.used_N.mean())}),
            "gain": gain.mean,
            "gain_95": [low, high],
            "seconds": time.perf_counter() - started,
        }
        return _noted(person, line | figures | {"decision": decision, "reason": reason})


def is_held_out(pair: Pair, share: float) -> bool:
    """Whether feedback is for testing: by its prompt alone, so that it stays so."""
    return int(prompt_key(pair.prompt)[:8], 16) / 16**8 < share


def decided(results: HeldOut, least_gain: float) -> tuple[Decision, str]:
    """Whether an adapter is put to use, and why."""
    base, new = float(results.base_N.mean()), float(results.new_N.mean())
    if new - base < least_gain:
        return "rolled back", f"it gains {new - base:+.0%} over the base model, and {least_gain:+.0%} is asked"
    if results.used_N is not None and new < float(results.used_N.mean()):
        return "rolled back", f"the adapter in use is right more often, {float(results.used_N.mean()):.0%}"
    return "used", f"it gains {new - base:+.0%} over the base model"


# -- an attempt


def _train(
    base: Path, pairs: Sequence[Pair], out: Path, config: PersonalConfig, *, seed: int, device: str, progress: Progress
) -> None:
    out.mkdir(parents=True)
    data = out / PAIRS
    write_text(data, "".join(json.dumps(_as_row(pair), ensure_ascii=False) + "\n" for pair in pairs))
    length = {"steps": config.steps} if config.steps is not None else {"epochs": config.epochs}
    settings = PreferenceConfig.parse(
        {
            "data": [str(data)],
            "adapter": {"rank": config.rank, "merge": False},
            "beta": config.beta,
            "learning_rate": config.learning_rate,
            "batch_size": config.batch_size,
            "context_length": config.context_length,
            "validation_share": 0.0,
            "diagnostics_every": 0,
            **({} if config.minutes is None else {"minutes": config.minutes}),
            **length,
        },
        "personalise",
    )
    preference(settings, base, out, seed=seed, device=device, progress=progress)


def _as_row(pair: Pair) -> dict[str, Any]:
    def plain(turns: Any) -> Any:
        return turns if isinstance(turns, str) else [dict(message) for message in turns]

    return {"prompt": plain(pair.prompt), "chosen": plain(pair.chosen), "rejected": plain(pair.rejected)}


def _tested(base: Path, person: Path, new: Path, pairs: Sequence[Pair], device: str, progress: Progress) -> HeldOut:
    model, tokenizer = load_model(base).eval(), load_tokenizer(base)
    used: Adapter | None = None
    if (person / ADAPTER).is_dir():
        # an adapter of another base is no rival, and is replaced
        with suppress(ArtefactError):
            used = read_adapter(person / ADAPTER, model)
    return HeldOut(
        preferred(model, tokenizer, pairs, None, progress),
        None if used is None else preferred(model, tokenizer, pairs, used, progress),
        preferred(model, tokenizer, pairs, read_adapter(new, model), progress),
    )


def preferred(
    model: Decoder, tokenizer: Tokenizer, pairs: Sequence[Pair], adapter: Adapter | None, progress: Progress | None = None
) -> np.ndarray:
    """For each pair 1.0 where the chosen answer has the higher mean log-probability of its tokens, else 0.0; (N,). A pair that
    the model's template cannot render is left out."""
    examples = []
    for pair in pairs:
        with suppress(RowError):
            examples += [_example(pair.prompt, answer, tokenizer) for answer in (pair.chosen, pair.rejected)]
    longest = max((len(example.tokens) for example in examples), default=1)
    with adapted(model, [] if adapter is None else [(adapter, None)]):
        losses = conversation_losses(model, examples, longest, tokenizer.bos_id, progress or Silent(), "held-out feedback")
    return (losses[0::2] < losses[1::2]).astype(np.float64)


def _example(prompt: Any, answer: Any, tokenizer: Tokenizer) -> EncodedExample:
    encoded = encode_answer(prompt, answer, tokenizer)
    row = encoded.example(len(encoded.ids))
    assert row is not None, "an answer has tokens"
    return EncodedExample(*row)


# -- what is kept of a person


def _put_to_use(new: Path, person: Path) -> None:
    """Swap adapters by renaming: at every moment a folder `adapter` or `previous` is whole."""
    shutil.rmtree(person / PREVIOUS, ignore_errors=True)
    if (person / ADAPTER).exists():
        (person / ADAPTER).rename(person / PREVIOUS)
    new.rename(person / ADAPTER)


def _noted(person: Path, line: dict[str, Any]) -> dict[str, Any]:
    with (person / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return line


def roll_back(person: Path) -> None:
    """Put the adapter before this one to use, or none where there was none. Raises ArtefactError where none is in use."""
    with locked_folder(person):
        if not (person / ADAPTER).exists():
            raise ArtefactError(f"{person}: no adapter is in use")
        shutil.rmtree(person / ADAPTER)
        if (person / PREVIOUS).exists():
            (person / PREVIOUS).rename(person / ADAPTER)
        _noted(person, {"time": time.time(), "decision": "rolled back", "reason": "asked for"})


def kept_of(person: Path) -> dict[str, Any]:
    """What is kept of a person: rows of feedback, files with their bytes, attempts. Raises ArtefactError where nothing is."""
    if not person.is_dir():
        raise ArtefactError(f"{person}: nothing is kept of this person")
    files = {str(path.relative_to(person)): path.stat().st_size for path in sorted(person.rglob("*")) if path.is_file()}
    lines = (person / HISTORY).read_text(encoding="utf-8").splitlines() if (person / HISTORY).exists() else []
    rows = sum(1 for _ in (person / PAIRS).open("rb")) if (person / PAIRS).exists() else 0
    return {"pairs": rows, "files": files, "history": [json.loads(line) for line in lines]}


def export(person: Path, out: Path) -> None:
    """Everything that is kept of a person, as a ZIP file. Raises ArtefactError where nothing is, or the file exists."""
    names = kept_of(person)["files"]
    if out.exists():
        raise ArtefactError(f"{out}: it exists already; name another file")
    with locked_folder(person), zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(person / name, name)


def forget(person: Path) -> int:
    """Delete everything that is kept of a person; the number of files. Raises ArtefactError where nothing is.

    The bytes of each file are overwritten before it is removed, which reaches the disk where the file system writes in place;
    copies that a backup made are the operator's to delete.
    """
    with locked_folder(person):
        names = kept_of(person)["files"]
        for name, size in names.items():
            with (person / name).open("r+b") as file:
                file.write(b"\0" * size)
                file.flush()
        shutil.rmtree(person)
    person.with_name(f".{person.name}.lock").unlink(missing_ok=True)
    return len(names)
