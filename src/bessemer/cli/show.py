"""`bessemer show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType


def show(
    thing: Annotated[str, typer.Argument(help="A run, a stage's folder, a corpus, tokenizer, shards, model, or a preset.")],
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Print and draw anything: a run, a stage, a corpus, a tokenizer, token shards, a model, a preset."""
    from rich.console import Console

    from bessemer.model.presets import PRESETS

    console = Console(highlight=False)
    if thing in PRESETS and not Path(thing).exists():
        console.print(_preset(thing))
        return
    console.print(_drawn(thing, runs))


def _drawn(thing: str, runs: Path) -> RenderableType:
    from bessemer.cli.named import find_run, run_names
    from bessemer.core.config import nearest
    from bessemer.core.errors import ArtefactError
    from bessemer.core.store import MANIFEST, follow
    from bessemer.model.presets import PRESETS
    from bessemer.pipeline.report import gather
    from bessemer.pipeline.run_folder import RunFolder
    from bessemer.views import terminal

    folder = follow(Path(thing))
    if not folder.exists():
        known = [*run_names(runs), *PRESETS]
        if thing not in run_names(runs):
            raise ArtefactError(f"there is no {thing!r}: not a path, a run or a preset{nearest(thing, known)}")
        folder = runs / thing
    if (folder / "run.json").exists():
        run = find_run(str(folder), runs)
        return terminal.show_run(gather(RunFolder(run.parent, run.name)))
    if (folder / "config.json").exists():
        return _model(folder)
    if (folder / "tokenizer.json").exists():
        return _tokenizer(folder)
    if (folder / MANIFEST).exists():
        return _stage(folder)
    if (folder.parent / MANIFEST).exists():  # documents, rejected or tokens inside a stage's folder
        return _stage(folder.parent)
    raise ArtefactError(f"{thing}: holds nothing that Bessemer made (no manifest, config.json or tokenizer.json)")


def _stage(folder: Path) -> RenderableType:
    """One stage's folder, from its manifest."""
    from bessemer.core.store import Artefact
    from bessemer.views import terminal

    manifest = Artefact(folder.name, folder).manifest
    stage, metrics = manifest["stage"], manifest["metrics"]
    if "documents_out" in metrics:
        return terminal.show_corpus({stage: metrics})
    if stage == "tokenize":
        return terminal.show_tokenizer(metrics)
    if stage == "model":
        return terminal.show_model(metrics)
    return terminal.show_facts(stage, {"made": manifest["created"], "seconds": manifest["seconds"], **metrics})


def _tokenizer(folder: Path) -> RenderableType:
    """A tokenizer's folder: all that its stage measured when it was made here, else what can be read off it."""
    from bessemer.core.store import MANIFEST

    if (folder.parent / MANIFEST).exists():
        return _stage(folder.parent)
    from bessemer.tokenization.tokenizer import load_tokenizer
    from bessemer.views import terminal

    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(_SAMPLE, add_bos=False)
    tokens = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids]
    return terminal.show_tokenizer({"vocab_size": tokenizer.vocab_size, "sample_tokens": tokens})


_SAMPLE = "The quick brown fox jumps over 13 lazy dogs: def fox(dogs: int) -> str: return 'über' * dogs"


def _model(folder: Path) -> RenderableType:
    from bessemer.model.folder import read_model_config
    from bessemer.model.summary import model_metrics
    from bessemer.views import terminal

    return terminal.show_model(model_metrics(read_model_config(folder)))


def _preset(name: str) -> RenderableType:
    from bessemer.model.config import preset_config
    from bessemer.model.presets import PRESET_VOCABULARIES
    from bessemer.model.summary import model_metrics
    from bessemer.views import terminal

    return terminal.show_model({"preset": name, **model_metrics(preset_config(name, PRESET_VOCABULARIES[name]))})
