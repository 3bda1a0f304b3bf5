"""`bessemer merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    model: Annotated[str, typer.Argument(help="What finetune wrote, or with --adapter any model but a GGUF file.")],
    out: Annotated[
        Path | None, typer.Argument(help="The folder to make; of what finetune wrote, its own folder model if none.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a low-rank adapter of the model.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights that are written: f32, f16 or bf16.")] = "f32",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Write a model with an adapter merged into its weights, for tools that take one set of weights."""
    from bessemer.cli.named import find_model
    from bessemer.core.config import nearest
    from bessemer.core.errors import ArtefactError, ConfigError
    from bessemer.model.formats.exchange import FLOATS
    from bessemer.model.tuned_folder import is_tuned, merge_adapter, tuned_model, whole_weights

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
