"""Arguments of commands resolved: MODEL and RUN, options of the form NAME=VALUE, options that are settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import follow

if TYPE_CHECKING:
    import typer

    from bessemer.assistant.tools import Tool
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.params import SamplingParams
    from bessemer.model.formats import ModelSource
    from bessemer.pipeline.run_folder import RunFolder
    from bessemer.retrieval.entailment import Entailment
    from bessemer.retrieval.expansion import Expander
    from bessemer.retrieval.rerank import Reranker


def find_run(name: str, runs: Path) -> Path:
    """The folder of a run, given by name or path. Raises ArtefactError with the nearest name."""
    from bessemer.pipeline import run_names

    for folder in (Path(name), runs / name):
        if (folder / "run.json").exists():
            return folder
    raise ArtefactError(f"there is no run {name!r}{nearest(name, run_names(runs))}")


def open_run(name: str, runs: Path) -> RunFolder:
    """A run, given by name or path. Raises as `find_run`."""
    from bessemer.pipeline.run_folder import RunFolder

    folder = find_run(name, runs)
    return RunFolder(folder.parent, folder.name)


def find_model(name: str, runs: Path, *, yes: bool = False) -> Path:
    """What MODEL means in every command: a path that holds a config.json, a run's folder or name, a GGUF file, the name of a
    model that was pulled, `smollm2`, or an id of the hub; of a fine-tuning its whole weights, into which an adapter is merged.
    Returns a folder, or a GGUF file.

    What is not on this machine is fetched where the user at the terminal agrees. yes: do not ask. Raises ArtefactError
    with the command that fetches it, or with the nearest name.
    """
    from bessemer.model.formats import find_model as find_source
    from bessemer.model.storage.library import SMOLLM2, find_kept, kept_models
    from bessemer.model.storage.tuned_folder import whole_weights
    from bessemer.pipeline import run_names

    if (weights := whole_weights(Path(name))) is not None:
        return weights
    for folder in (Path(name), Path(name) / "model", runs / name / "model"):
        if (follow(folder) / "config.json").exists():
            return follow(folder)
    if find_kept(name) is None and any((run / "run.json").exists() for run in (Path(name), runs / name)):
        raise ArtefactError(f"the run {name!r} has no model yet; finish it with bessemer run")
    source = find_source(name)
    if source is None:
        known = [*run_names(runs), *(model.name for model in kept_models()), SMOLLM2]
        raise ArtefactError(f"there is no model {name!r}: not a folder, a run or a pulled one{nearest(name, known)}")
    return source.path if source.kind in ("gguf", "folder") else _fetched(name, yes=yes)


def _fetched(name: str, *, yes: bool) -> Path:
    """`smollm2`, or a model of the hub, pulled where the user agrees. Raises ArtefactError, with the command, where not."""
    import typer

    from bessemer.core.metrics import size
    from bessemer.model.formats.pull import pull, size_to_fetch
    from bessemer.model.storage.library import library_folder

    if not yes:
        if not sys.stdin.isatty():
            raise ArtefactError(f"the model {name!r} is not on this machine; to fetch it: bessemer pull {name}")
        wanted = size_to_fetch(name)
        amount = "" if wanted is None else f" {size(wanted)}"
        try:
            agreed = typer.confirm(
                f"{name} is not on this machine: fetch{amount} into {library_folder()}/?", default=True, err=True
            )
        except typer.Abort:  # Ctrl-C and Ctrl-D
            print(file=sys.stderr)
            agreed = False
        if not agreed:
            raise ArtefactError(f"nothing was fetched; whenever you want the model: bessemer pull {name}")
    kept, notes = pull(name)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return kept.place


@contextmanager
def as_folder(model: Path, out: Path) -> Iterator[Path]:
    """While entered, a model as a folder: a GGUF file is imported into a temporary one, on the disk of `out`."""
    if not model.is_file():
        yield model
        return
    from tempfile import TemporaryDirectory

    from bessemer.model.formats.gguf_import import import_gguf
    from bessemer.model.formats.gguf_mmproj import find_mmproj

    if (mmproj := find_mmproj(model)) is not None:
        print(f"note: the decoder alone is taken; bessemer import takes {mmproj.name}, too", file=sys.stderr)
    disk = next(folder for folder in out.resolve().parents if folder.is_dir())
    with TemporaryDirectory(prefix=".bessemer-", dir=disk) as scratch:
        for note in import_gguf(model, Path(scratch) / "model"):
            print(f"note: {note}", file=sys.stderr)
        yield Path(scratch) / "model"


def find_served(name: str, runs: Path) -> Path:
    """A model for an engine: what `find_model` finds, and a fine-tuning's folder as it is, whose adapter the engine opens with
    its base. Raises as `find_model`."""
    from bessemer.model.storage.tuned_folder import tuned_model

    tuned = tuned_model(Path(name))
    return Path(name) if tuned is not None and tuned.adapter is not None else find_model(name, runs)


def find_reranker(name: str, runs: Path) -> tuple[str, Reranker]:
    """What `--rerank` names, behind the name by which clients of a server ask for it: the last part. Raises as `find_served`
    and `open_reranker`."""
    from bessemer.retrieval.rerank import open_reranker

    is_known = name.startswith(("http://", "https://")) or (Path(name) / "config.json").exists()
    return Path(name.rpartition("#")[2]).name, open_reranker(name if is_known else str(find_served(name, runs)))


def find_expander(name: str, runs: Path) -> Expander:
    """The language model that `--expand` names. Raises as `find_served`."""
    from bessemer.inference.engine import Engine
    from bessemer.retrieval.expansion import HeadingWriter

    return HeadingWriter(Engine(find_served(name, runs)))


def find_entailment(head: Path, runs: Path) -> Entailment:
    """The head that `--check` names, over its model. Raises as `load_head`, `find_served` and `Entailment`."""
    from bessemer.inference.engine import Engine
    from bessemer.retrieval.entailment import Entailment, load_head

    loaded = load_head(head)
    return Entailment(Engine(find_served(loaded.model, runs)), loaded)


def example_questions(model: Path, run: Path | None = None, count: int = 3) -> list[str]:
    """A few questions that a fine-tuned model was trained on, from its folder, the one around it, or a stage of its run."""
    near = [model, model.parent]
    folders = [*near, *(follow(stage) for stage in sorted((run / "stages").glob("*")))] if run else near
    path = next((path for folder in folders if (path := folder / "conversations" / "train.jsonl").exists()), None)
    if path is None:
        return []
    from itertools import islice

    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, count)]
    turns = [record.get("messages", record.get("prompt")) for record in records]
    questions = [turn if isinstance(turn, str) else _first_question(turn) for turn in turns]
    return [question for question in questions if question]


def _first_question(messages: list[dict[str, Any]]) -> str:
    """The words of the user's first message."""
    content = next((message.get("content") for message in messages if message["role"] == "user"), "")
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(str(part.get("text") or "") for part in parts)


def speculation(named: str | None, runs: Path) -> dict[str, Any]:
    """The engine's setting for `--speculate`: a method, or a draft model."""
    if named is None:
        return {}
    known = named in ("ngram", "mtp")
    return {"speculation": {"method": named} if known else {"method": "draft", "model": str(find_model(named, runs))}}


def named_numbers(setting: str, given: list[str] | None) -> dict[str, Any]:
    """The engine's setting for a repeated option such as `--parallel NAME=NUMBER`. Raises ConfigError."""
    numbers: dict[str, str] = {}
    for option in given or ():
        name, has_number, number = option.partition("=")
        if not has_number or name in numbers:
            raise ConfigError(f"--{setting} {option}: " + ("it is given twice" if has_number else "give it as NAME=NUMBER"))
        numbers[name] = number
    return {setting: numbers} if numbers else {}


def option_of(command: str) -> Callable[[tuple[str | int, ...]], str]:
    """A function from the path of a wrong setting to the option that gave it, for messages."""

    def option(path: tuple[str | int, ...]) -> str:
        return " ".join([f"--{path[0]}".replace("_", "-"), *map(str, path[1:])]) if path else command

    return option


def given_options(context: typer.Context, *names: str) -> dict[str, Any]:
    """The options of a command by these names, without those that were not given and have no default."""
    return {name: context.params[name] for name in names if context.params[name] is not None}


def sampling_options(context: typer.Context) -> Callable[[Engine], SamplingParams]:
    """A command's options of sampling, over what the model's own folder says; greedy where neither says how.

    Raises ConfigError, before a model is opened, for a value that is not valid.
    """
    from bessemer.inference.sampling.params import SamplingParams

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    stated = given_options(context, *(name for name in names if name in context.params))
    SamplingParams.parse(stated, option_of(context.info_name or ""))

    def params_for(engine: Engine) -> SamplingParams:
        usual = {} if "temperature" in engine.sampling_settings else {"temperature": 0.0}
        return engine.default_params.with_changes(**usual | stated)

    return params_for


def named_models(given: list[str] | None, taken: Collection[str]) -> dict[str, str]:
    """Name → model of a repeated `--also NAME=MODEL`; the name may be left out where it is the last part of the model's.

    taken: the names of the first model and its adapters. Raises ConfigError for a name that means two things, or none.
    """
    return _named("also", "MODEL", given, dict.fromkeys(taken, "another model"), "another model")


def named_folders(given: list[str] | None, taken: str | None = None) -> dict[str, str]:
    """Name → folder of a repeated `--adapter NAME=FOLDER`; the name may be left out where it is the folder's.

    taken: a name that stands for the model itself. Raises ConfigError for a name that means two things, or none.
    """
    return _named("adapter", "FOLDER", given, {} if taken is None else {taken: "the model"}, "another adapter")


def _named(option: str, what: str, given: list[str] | None, taken: Mapping[str, str], another: str) -> dict[str, str]:
    """Name → value of a repeated option. taken: what has a name already; another: what has it among the values given."""
    places: dict[str, str] = {}
    for argument in given or ():
        name, has_name, place = argument.partition("=")
        if not has_name:
            name, place = Path(argument).name, argument
        if not name or not place:
            raise ConfigError(f"--{option} {argument}: give it as NAME={what}")
        if name in taken or name in places:
            raise ConfigError(
                f"--{option} {argument}: {taken.get(name, another)} has the name {name!r} already; choose another"
            )
        places[name] = place
    return places


@contextmanager
def mcp_tools(config: Path, budget: int, *, approve: bool) -> Iterator[Callable[[str], list[Tool]]]:
    """While entered, the MCP servers of a file run; what is given returns the tools to offer for a question, of at most
    `budget` tokens. Raises ConfigError for the file."""
    from bessemer.agents.mcp_client import open_mcp_servers
    from bessemer.agents.tool_choice import choose_tools

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with open_mcp_servers(config, report, approve=approve) as servers:
        yield lambda question: choose_tools(servers.tools(), question, budget)


def model_source(model: str, runs: Path) -> ModelSource:
    """What MODEL means, as `import` takes it."""
    from bessemer.model.formats import ModelSource

    path = find_model(model, runs)
    return ModelSource("gguf" if path.is_file() else "folder", str(path))
