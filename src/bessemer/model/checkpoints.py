"""Checks whether a folder holds weights that can be opened, and says why not. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from bessemer.core.errors import ArtefactError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def holds_weights(folder: Path) -> bool:
    """Whether there are weights as safetensors in a folder."""
    return any(folder.glob("*.safetensors")) or (folder / WEIGHTS_INDEX).exists()


def refuse_checkpoint(folder: Path) -> None:
    """Raise ArtefactError for a folder with a training checkpoint or pickled weights, unless safetensors lie beside them."""
    if holds_weights(folder):
        return
    if (folder / ".metadata").exists() or any(folder.glob("*.distcp")):
        raise ArtefactError(
            f"{folder}: a training checkpoint (torch.distributed.checkpoint), not a model; the program that wrote it exports "
            "it: of a run of bessemer name runs/NAME/model, of transformers' Trainer the folder of save_model"
        )
    for suffix in PICKLES:
        for path in sorted(folder.glob(f"*{suffix}")):
            refuse_pickle(path)


def refuse_pickle(path: Path) -> NoReturn:
    """Raise ArtefactError for someone else's `.pt`, `.bin` or `.ckpt`."""
    raise ArtefactError(
        f"{path}: a pickle, which may run code and is not opened; where it was made, load it and write safetensors: "
        "model.save_pretrained(FOLDER) in transformers, safetensors.torch.save_model elsewhere"
    )
