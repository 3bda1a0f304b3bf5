"""Checkpoints that a kill at any moment cannot spoil, and that continue a run to the bit.

A checkpoint is written by PyTorch's distributed checkpoint into a folder with a temporary name, beside an index of
its files' hashes, and renamed when it is complete. On the way back the index is checked before a file is opened: the
format holds a pickle, so only what this run wrote is read.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from bessemer.core.errors import ArtefactError, CheckpointError, as_storage_error
from bessemer.core.hashing import hash_files
from bessemer.core.progress import Progress
from bessemer.core.store import check_format, read_json, write_json

#: Format number of a checkpoint's index; raised when its shape changes.
CHECKPOINT_FORMAT = 1
_INDEX = "checkpoint.json"
_KEPT = 2


@dataclass
class TrainingState:
    """Everything that the rest of a run depends on."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    step: int = 0
    seconds: float = 0.0

    def read(self) -> dict[str, Any]:
        """The state as nested plain values and tensors, in the names of the model's parameters."""
        model_state, optimizer_state = get_state_dict(self.model, self.optimizers)
        return {
            "model": model_state,
            "optimizer": optimizer_state,
            "random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def write(self, values: dict[str, Any]) -> None:
        """Put a state that `read` gave back in place."""
        set_state_dict(self.model, self.optimizers, model_state_dict=values["model"], optim_state_dict=values["optimizer"])
        torch.set_rng_state(values["random"])
        self.step, self.seconds = values["step"], values["seconds"]


class Checkpoints:
    """The checkpoints of one run: `step-NNNNNN` below one folder, the newest two of them."""

    def __init__(self, folder: Path, identity: dict[str, str], progress: Progress) -> None:
        """`identity`: hashes of what a checkpoint must agree with to be continued (config, data), by name."""
        self.folder, self._identity, self._progress = folder, identity, progress
        folder.mkdir(parents=True, exist_ok=True)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, unread."""
        return max(self.folder.glob("step-*"), key=_step_of, default=None)

    def save(self, state: TrainingState) -> Path:
        """Write the state, complete or not at all, and remove all but the newest two. Raises StorageError."""
        final = self.folder / f"step-{state.step:06d}"
        partial = self.folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with _single_process():
                save(state.read(), checkpoint_id=partial, no_dist=True)
            files = hash_files(partial, [path for path in partial.rglob("*") if path.is_file()])
            index = {"format": CHECKPOINT_FORMAT, "step": state.step, "identity": self._identity, "files": files}
            write_json(partial / _INDEX, index)
        except BaseException as error:  # PyTorch's CheckpointException is no Exception, and holds the ranks' errors
            shutil.rmtree(partial, ignore_errors=True)
            causes = [error, *(failure for failure, _ in getattr(error, "failures", {}).values())]
            full = next(filter(None, (as_storage_error(cause, self.folder) for cause in causes)), None)
            if full is not None:
                raise full from None
            raise
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        for old in sorted(self.folder.glob("step-*"), key=_step_of)[:-_KEPT]:
            shutil.rmtree(old)
        return final

    def restore(self, state: TrainingState) -> bool:
        """Load the newest checkpoint that is whole into `state`; False when there is none, so the run starts anew.

        A damaged one is named and passed over for the one before. Raises CheckpointError when a checkpoint belongs to
        another configuration or other data.
        """
        for folder in sorted(self.folder.glob("step-*"), key=_step_of, reverse=True):
            try:
                index = self._verified(folder)
            except CheckpointError as error:
                self._progress.say(f"  {error}; going back to the one before")
                continue
            for name, value in self._identity.items():
                if index["identity"].get(name) != value:
                    raise CheckpointError(
                        f"{folder}: this checkpoint was made with another {name}; go back to that one, or delete "
                        f"{self.folder} to start again"
                    )
            values = state.read()
            with _single_process():
                load(values, checkpoint_id=folder, no_dist=True)
            state.write(values)
            return True
        return False

    def _verified(self, folder: Path) -> dict[str, Any]:
        """The index of a checkpoint whose files are those that were written. Raises CheckpointError otherwise."""
        try:
            index: dict[str, Any] = read_json(folder / _INDEX, "checkpoint's index")
            check_format(index.get("format"), CHECKPOINT_FORMAT, folder / _INDEX, "checkpoint's index")
            found = hash_files(folder, [folder / name for name in index["files"]])
        except (ArtefactError, OSError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{folder}: this checkpoint is damaged ({error})") from None
        for name, expected in index["files"].items():
            if found[name] != expected:
                raise CheckpointError(f"{folder / name}: this checkpoint is damaged, its content has changed")
        return index


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


class _single_process(warnings.catch_warnings):  # noqa: N801
    """Silences PyTorch's remark that a single process is a single process."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process.*")
