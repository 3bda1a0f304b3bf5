"""What MODEL and RUN mean on the command line: a path, or a run's name."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import follow

if TYPE_CHECKING:
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.params import SamplingParams


def find_run(name: str, runs: Path) -> Path:
    """The folder of a run, given by name or path. Raises ArtefactError with the nearest name."""
    for folder in (Path(name), runs / name):
        if (folder / "run.json").exists():
            return folder
    raise ArtefactError(f"there is no run {name!r}{_nearest_run(name, runs)}")


def find_model(name: str, runs: Path) -> Path:
    """A model: a GGUF file, a path that holds a config.json, a run's folder or name, or the name of one that was pulled; of a
    fine-tuning its whole weights, into which an adapter is merged.

    Raises ArtefactError with the nearest run's name or, for a name of the Hugging Face hub, the command that imports it.
    """
    from bessemer.model.formats.hub import import_advice
    from bessemer.model.library import find_kept
    from bessemer.model.tuned_folder import whole_weights

    if (weights := whole_weights(Path(name))) is not None:
        return weights
    if name.endswith(".gguf") and Path(name).is_file():
        return Path(name)
    for folder in (Path(name), Path(name) / "model", runs / name / "model"):
        if (follow(folder) / "config.json").exists():
            return follow(folder)
    if (kept := find_kept(name)) is not None:
        return kept
    if (runs / name / "run.json").exists() or (Path(name) / "run.json").exists():
        raise ArtefactError(f"the run {name!r} has no model yet; finish it with bessemer run")
    hint = import_advice(name) or _nearest_run(name, runs)
    raise ArtefactError(f"there is no model {name!r}: not a model's folder and not a run{hint}")


def find_served(name: str, runs: Path) -> Path:
    """A model for an engine: what `find_model` finds, and a fine-tuning's folder as it is, whose adapter the engine puts beside
    its base. Raises as `find_model`."""
    from bessemer.model.tuned_folder import tuned_model

    tuned = tuned_model(Path(name))
    return Path(name) if tuned is not None and tuned.adapter is not None else find_model(name, runs)


def _nearest_run(name: str, runs: Path) -> str:
    from bessemer.pipeline.run_names import run_names

    return nearest(name, run_names(runs))


def example_questions(model: Path, run: Path | None = None, count: int = 3) -> list[str]:
    """A few questions that a fine-tuned model has learned to answer, from beside its folder, or from a stage of its run."""
    beside = [model, model.parent]
    folders = [*beside, *(follow(stage) for stage in sorted((run / "stages").glob("*")))] if run else beside
    path = next((path for folder in folders if (path := folder / "conversations" / "train.jsonl").exists()), None)
    if path is None:
        return []
    from itertools import islice

    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, count)]
    turns = [record.get("messages", record.get("prompt")) for record in records]
    asked = [turn if isinstance(turn, str) else _first_question(turn) for turn in turns]
    return [question for question in asked if question]


def _first_question(messages: list[dict[str, Any]]) -> str:
    """What the user says first, behind a system message."""
    return next((str(message.get("content") or "") for message in messages if message["role"] == "user"), "")


def speculation(named: str | None) -> dict[str, Any]:
    """The engine's setting for what `--speculate` names: a method, or the folder of a draft model."""
    if named is None:
        return {}
    known = named in ("ngram", "mtp")
    return {"speculation": {"method": named} if known else {"method": "draft", "model": named}}


def named_numbers(setting: str, given: list[str] | None) -> dict[str, Any]:
    """The engine's setting for what an option like `--parallel NAME=NUMBER` gives, once or more. Raises ConfigError."""
    numbers: dict[str, str] = {}
    for one in given or ():
        name, has_number, number = one.partition("=")
        if not has_number or name in numbers:
            raise ConfigError(f"--{setting} {one}: " + ("it is given twice" if has_number else "give it as NAME=NUMBER"))
        numbers[name] = number
    return {setting: numbers} if numbers else {}


def option_of(command: str) -> Callable[[tuple[str | int, ...]], str]:
    """What names a command's option for an offending setting."""

    def option(path: tuple[str | int, ...]) -> str:
        return " ".join([f"--{path[0]}".replace("_", "-"), *map(str, path[1:])]) if path else command

    return option


def sampling_options(command: str, **given: Any) -> Callable[[Engine], SamplingParams]:
    """What a command's options say of sampling, over what the model's own folder says; greedy where neither says how.

    given: None for an option that is not used. Raises ConfigError, before a model is opened, for a value that is not valid.
    """
    from bessemer.inference.sampling.params import SamplingParams

    stated = {name: value for name, value in given.items() if value is not None}
    SamplingParams.parse(stated, option_of(command))

    def params_for(engine: Engine) -> SamplingParams:
        usual = {} if "temperature" in engine.sampling_settings else {"temperature": 0.0}
        return engine.default_params.with_changes(**usual | stated)

    return params_for


def named_models(given: list[str] | None, taken: Collection[str]) -> dict[str, str]:
    """What `--also NAME=MODEL` gives, once or more; without a name it is the last part of the model's.

    taken: the names of the first model and its adapters. Raises ConfigError for a name that means two things, or none.
    """
    return _named("also", "MODEL", given, dict.fromkeys(taken, "another model"), "another model")


def named_folders(given: list[str] | None, taken: str | None = None) -> dict[str, str]:
    """What `--adapter NAME=FOLDER` gives, once or more; the name may be left out where it is the folder's.

    taken: a name that stands for the model itself. Raises ConfigError for a name that means two things, or none.
    """
    return _named("adapter", "FOLDER", given, {} if taken is None else {taken: "the model"}, "another adapter")


def _named(option: str, what: str, given: list[str] | None, taken: Mapping[str, str], another: str) -> dict[str, str]:
    """What an option `NAME=…` gives, once or more. taken: who has a name already; another: who has it of the others given."""
    found: dict[str, str] = {}
    for one in given or ():
        name, has_name, place = one.partition("=")
        if not has_name:
            name, place = Path(one).name, one
        if not name or not place:
            raise ConfigError(f"--{option} {one}: give it as NAME={what}")
        if name in taken or name in found:
            raise ConfigError(f"--{option} {one}: {taken.get(name, another)} has the name {name!r} already; choose another")
        found[name] = place
    return found
