"""`bessemer merge`, `average` and `extend`: a model with other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.options import Runs


def average(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Two or more of RUN@STEP: the last of a run, or of runs that began as one.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the model to write.")],
) -> None:
    """Write the model whose weights are the mean of checkpoints'."""
    from bessemer.core.errors import ConfigError
    from bessemer.core.store import new_folder
    from bessemer.model.storage.folder import save_model
    from bessemer.training.checkpoint.export import averaged_model, find_checkpoint

    if len(checkpoints) < 2:
        raise ConfigError("give at least two checkpoints, RUN@STEP RUN@STEP, and then the folder to write")
    with new_folder(out) as folder:
        model, tokenizer = averaged_model([find_checkpoint(name, Path(), where="RUN@STEP") for name in checkpoints])
        save_model(model, folder, tokenizer=tokenizer)
    print(f"{out}: the mean of {len(checkpoints)} checkpoints, {model.config.parameters():,} parameters")


def merge(
    model: Annotated[str, typer.Argument(help="What finetune wrote, or with --adapter any model but a GGUF file.")],
    out: Annotated[
        Path | None, typer.Argument(help="The folder to make; of what finetune wrote, its own folder model if none.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a low-rank adapter of the model.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights that are written: f32, f16 or bf16.")] = "f32",
    runs: Runs = Path("runs"),
) -> None:
    """Write a model with an adapter merged into its weights, for tools that take one set of weights."""
    from bessemer.cli.named import find_model
    from bessemer.core.config import nearest
    from bessemer.core.errors import ArtefactError, ConfigError
    from bessemer.model.formats import FLOATS
    from bessemer.model.storage.tuned_folder import is_tuned, merge_adapter, tuned_model, whole_weights

    if dtype not in FLOATS:
        raise ConfigError(f"--dtype: there is no {dtype!r}{nearest(dtype, list(FLOATS))}; {', '.join(FLOATS)}")
    if out is None and (adapter is not None or not is_tuned(Path(model))):
        raise ConfigError("merge: name the folder to make: bessemer merge MODEL FOLDER --adapter ADAPTER")
    base = None
    if adapter is None:
        tuned = tuned_model(Path(model), whole=False)
        if tuned is None:
            raise ConfigError(f"merge: {model} is not what finetune wrote; name its adapter with --adapter")
        base, adapter = tuned
        if adapter is None:
            raise ArtefactError(f"{model}: all weights were tuned, and {base} has them; there is nothing to merge")
    if out is None:
        if dtype != "f32":
            raise ConfigError("--dtype: name the folder to make; that of the fine-tuning itself is in f32")
        print(f"{whole_weights(Path(model))}: the model with its adapter merged into it")
        return
    base = base or find_model(model, runs)
    import torch

    merge_adapter(base, adapter, out, getattr(torch, FLOATS[dtype]))
    print(f"{out}: {base} with {adapter} merged into it")


def extend(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="A tokenizer's folder, or a model: a folder, a GGUF file, a run, or a pulled one."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    token: Annotated[list[str] | None, typer.Option(help="A token that is found in any text; may be repeated.")] = None,
    special: Annotated[
        list[str] | None, typer.Option(help="A control token, which only templates write; may be repeated.")
    ] = None,
    init: Annotated[
        str, typer.Option(help="A model's new rows: mean, of all, or subtokens, of what wrote it before.")
    ] = "mean",
    runs: Runs = Path("runs"),
) -> None:
    """Add tokens to a tokenizer, or to a model and its tokenizer. Ids that exist keep their tokens and their weights."""
    from bessemer.cli.named import as_folder, find_model
    from bessemer.core.errors import ConfigError
    from bessemer.core.store import follow, new_folder

    if not token and not special:
        raise ConfigError("nothing to add: give --token or --special")
    if init not in ("mean", "subtokens"):
        raise ConfigError(f"--init: {init!r} is not one of mean, subtokens")
    folder = follow(Path(source))
    if (folder / "tokenizer.json").exists() and not (folder / "config.json").exists():
        from bessemer.tokenization.existing import add_tokens

        with new_folder(out) as written:
            extension = add_tokens(folder, written, token or [], special or [])
    else:
        from bessemer.model.stage import extend_model

        with as_folder(find_model(source, runs), out) as model:
            extension = extend_model(model, out, token or [], special or [], init="mean" if init == "mean" else "subtokens")
    for known, id in extension.skipped.items():
        print(f"skipped {known!r}: it is one token already, id {id}")
    for id, added in extension.added.items():
        print(f"{id}  {added!r}")
    print(f"{out}: {extension.size + len(extension.added):,} tokens, {len(extension.added):,} of them new")
