"""`bessemer average`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def average(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Two or more of RUN@STEP: the last of a run, or of runs that began as one.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the model to write.")],
) -> None:
    """Write the model whose weights are the mean of checkpoints'."""
    from bessemer.core.errors import ConfigError
    from bessemer.core.new_folder import new_folder
    from bessemer.model.folder import save_model
    from bessemer.training.checkpoint.load import averaged_model, find_checkpoint

    if len(checkpoints) < 2:
        raise ConfigError("give at least two checkpoints, RUN@STEP RUN@STEP, and then the folder to write")
    with new_folder(out) as folder:
        model, beside = averaged_model([find_checkpoint(name, Path(), where="RUN@STEP") for name in checkpoints])
        save_model(model, folder, tokenizer=beside)
    print(f"{out}: the mean of {len(checkpoints)} checkpoints, {model.config.parameters():,} parameters")
