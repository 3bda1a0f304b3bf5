"""Checkpoints of a run: atomic, exact on resume, and independent of the number of processes.

PyTorch's distributed checkpoint writes into a folder with a temporary name, each process its own shards
(`checkpoint/storage.py`), beside an index of the files' hashes; the folder is renamed when it is complete. Before a file is
opened its hash is checked, and no code of a file is run, so checkpoints of a downloaded run are safe
to open.
"""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from bessemer.core.errors import ArtefactError, CheckpointError, as_storage_error
from bessemer.core.hashing import hash_files
from bessemer.core.progress import Progress
from bessemer.core.store import check_format, read_json, write_json
from bessemer.distributed.mesh import ALONE, Mesh, new_group
from bessemer.training.checkpoint.state import RANDOM_STATES, HostCopies, TrainingState
from bessemer.training.checkpoint.storage import CheckpointReader, ProcessNotes, ShardWriter, check_plain, read_checkpoint

#: Format number of a checkpoint's index; raised when its shape changes.
CHECKPOINT_FORMAT = 2
CHECKPOINTS, INDEX = "checkpoints", "checkpoint.json"
#: Number of the newest checkpoints that are kept.
_KEPT = 2


class CheckpointManager:
    """The checkpoints of one run, `step-NNNNNN` below one folder: the newest two, those that `keep_every` names, and that of
    `kept_step`."""

    def __init__(
        self,
        folder: Path,
        identity: dict[str, str],
        progress: Progress,
        *,
        mesh: Mesh = ALONE,
        keep_every: int | None = None,
        background: bool = False,
    ) -> None:
        """identity: hashes that a checkpoint must match to be resumed: model, optimizer, configuration, data.

        keep_every: keep the first checkpoint and those at multiples of this number of steps. background: write from a copy
        while training continues; `wait` waits for the write. Every process of the mesh makes the same calls.
        """
        self.folder = folder
        self._identity = identity
        self._progress = progress
        self._mesh = mesh
        self._keep_every = keep_every
        #: The best step, whose checkpoint is kept too.
        self.kept_step: int | None = None
        # a group of its own, so that collectives of the writing thread do not mix with those of training
        self._group = None if mesh.alone else new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: Future[Path] | None = None
        self._copies = HostCopies()
        folder.mkdir(parents=True, exist_ok=True)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, not opened."""
        return newest_checkpoint(self.folder)

    def save(self, state: TrainingState) -> Path:
        """Write the state atomically and remove old checkpoints. Raises StorageError; a background write raises it at the next
        call."""
        self.wait()
        values, final = state.read(), checkpoint_of_step(self.folder, state.step)
        if self._thread is None:
            return self._write(values, state.step, final)
        # the copies are ordered before what training does next, and only the thread that writes waits for them
        self._writing = self._thread.submit(self._write_copies, self._copies.copy(values), state.step, final)
        return final

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises StorageError when it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write_copies(self, values: dict[str, Any], step: int, final: Path) -> Path:
        self._copies.wait()
        return self._write(values, step, final)

    def _write(self, values: dict[str, Any], step: int, final: Path) -> Path:
        unfinished = final.parent / f".{final.name}.partial"
        if self._mesh.leads:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._check_values(values, final)
        parts = ProcessNotes(unfinished, final, self._mesh, self._progress)
        try:
            writer = ShardWriter(unfinished)
            with _quietly():
                # only plans: collectives inside the write would time out while one process is still writing
                save(values, storage_writer=writer, no_dist=self._mesh.alone, process_group=self._group)
            written = writer.write()
            own = {"files": hash_files(unfinished, unfinished.glob(f"__{self._mesh.rank}_*")), "written": written}
            if self._mesh.leads:
                self._publish(parts.gathered(own), parts, writer, unfinished, final, step)
            else:
                parts.leave(own)
        except BaseException as error:
            # PyTorch's CheckpointException, which holds the errors of all ranks, is not an Exception
            causes = [error, *(cause for cause, _ in getattr(error, "failures", {}).values())]
            full = next(filter(None, (as_storage_error(cause, self.folder) for cause in causes)), None)
            raised = parts.give_up(full or error)
            if raised is error:
                raise
            raise raised from None
        return final

    def _check_values(self, values: dict[str, Any], final: Path) -> None:
        """Raise CheckpointError on all processes where one has values that could not be read back. A barrier too, before which
        nobody writes."""
        try:
            check_plain(values)
            problem = None
        except CheckpointError as error:
            problem = error
        everyone = self._gathered(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        other = next(filter(None, everyone), None)
        if other is not None:
            raise CheckpointError(f"{final}: another process cannot write its part of this checkpoint: {other}")

    def _publish(
        self, everyone: list[dict[str, Any]], parts: ProcessNotes, writer: ShardWriter, unfinished: Path, final: Path, step: int
    ) -> None:
        """Complete the folder that all processes have written to, and give it its name."""
        writer.complete([entry for part in everyone for entry in part["written"]])
        files = hash_files(unfinished, [unfinished / ".metadata"])
        for part in everyone:
            files |= part["files"]
        write_json(unfinished / INDEX, {"format": CHECKPOINT_FORMAT, "step": step, "identity": self._identity, "files": files})
        parts.remove_notes()
        shutil.rmtree(final, ignore_errors=True)
        unfinished.replace(final)
        self._prune()

    def _gathered(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; a barrier too."""
        if self._mesh.alone:
            return [value]
        everyone: list[Any] = [None] * self._mesh.layout.world_size
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def _prune(self) -> None:
        folders = sorted(self.folder.glob("step-*"), key=step_of)
        kept = set(folders[-_KEPT:])
        if self._keep_every is not None:
            kept |= {folders[0], *(folder for folder in folders if step_of(folder) % self._keep_every == 0)}
        if self.kept_step is not None:
            kept.add(checkpoint_of_step(self.folder, self.kept_step))
        for old in folders:
            if old not in kept:
                shutil.rmtree(old)

    def restore(self, state: TrainingState) -> bool:
        """Load the newest intact checkpoint into `state`; False when there is none.

        A damaged one is reported and skipped. Raises CheckpointError when a checkpoint has another configuration or other data.
        """
        folders = sorted(self.folder.glob("step-*"), key=step_of, reverse=True)
        for name in self._gathered([folder.name for folder in folders])[0]:
            folder = self.folder / name
            try:
                index, problem = self._verified(folder), None
            except CheckpointError as error:
                index, problem = {}, str(error)
            problem = next(filter(None, self._gathered(problem)), None)
            if problem is not None:
                self._progress.say(f"  {problem}; going back to the one before")
                continue
            for name, value in self._identity.items():
                if index["identity"].get(name) != value:
                    raise CheckpointError(
                        f"{folder}: this checkpoint was made with another {name}; go back to that one, or delete "
                        f"{self.folder} to start again"
                    )
            self._load(folder, state)
            return True
        return False

    def load_from(self, folder: Path, state: TrainingState) -> set[str]:
        """Load a checkpoint of another run into `state`: weights, optimizer states and step; settings and data may differ.

        Returns the names of the state's `others` that the checkpoint does not hold and that are not changed. Raises
        CheckpointError when it is damaged, or of another model or optimizer.
        """
        index = self._verified(folder)
        for name in ("model", "optimizer"):
            if index["identity"].get(name) != self._identity[name]:
                raise CheckpointError(
                    f"{folder}: this checkpoint is of another {name} than this run's, which cannot go on from it"
                )
        stored = CheckpointReader(folder).read_metadata().state_dict_metadata
        loaded = {name for name in state.others if any(key.startswith(f"others.{name}.") for key in stored)}
        self._load(folder, state, loaded)
        return set(state.others) - loaded

    def _load(self, folder: Path, state: TrainingState, others: set[str] | None = None) -> None:
        """others: the names of the state's `others` that are loaded; all when None."""
        values = state.read()
        if others is not None:
            values["others"] = {name: value for name, value in values["others"].items() if name in others}
        stored = CheckpointReader(folder).read_metadata().state_dict_metadata
        present = _without_new_optimizer_states(values, set(stored))
        with _quietly():
            read_checkpoint(present, folder, alone=self._mesh.alone, group=self._group)
        # where the checkpoint has no random state of a rank, this process's own must not replace it
        state.write(_merged(values, present) | {RANDOM_STATES: present[RANDOM_STATES]})

    def _verified(self, folder: Path) -> dict[str, Any]:
        """The index of a checkpoint, after every process has checked its part of the files."""
        return verified(folder, self._mesh.rank, self._mesh.layout.world_size)


def _without_new_optimizer_states(values: dict[str, Any], stored: set[str], prefix: str = "") -> dict[str, Any]:
    """Nested values without those optimizer states that a checkpoint does not hold: of parameters that had had no gradient."""
    present: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            present[name] = _without_new_optimizer_states(value, stored, f"{path}.")
        elif not (name.startswith("state.") and prefix.endswith("optimizer.") and path not in stored):
            present[name] = value
    return present


def _merged(values: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """Nested values, replaced by loaded ones where there are any."""
    return {
        name: _merged(value, loaded[name]) if isinstance(value, dict) else loaded.get(name, value)
        for name, value in values.items()
    }


def steps_of(folder: Path) -> list[int]:
    """The steps of the complete checkpoints below a folder, in order."""
    return sorted(map(step_of, folder.glob("step-*")))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below a folder, not opened."""
    return max(folder.glob("step-*"), key=step_of, default=None)


def verified(folder: Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """The index of a checkpoint, after checking the hashes of every `ranks`-th of its files.

    Raises CheckpointError when they do not match.
    """
    try:
        index: dict[str, Any] = read_json(folder / INDEX, "checkpoint's index")
        check_format(index.get("format"), CHECKPOINT_FORMAT, folder / INDEX, "checkpoint's index")
        names = list(index["files"])[rank::ranks]
        hashes = hash_files(folder, [folder / name for name in names])
    except (ArtefactError, OSError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: this checkpoint is damaged ({error})") from None
    for name in names:
        if hashes[name] != index["files"][name]:
            raise CheckpointError(f"{folder / name}: this checkpoint is damaged, its content has changed")
    return index


def checkpoint_weights(folder: Path, section: str = "model") -> dict[str, Tensor]:
    """The unsharded tensors of a checkpoint's model by name, on the CPU; any layout may have written them.

    section: of the state. Raises CheckpointError when the checkpoint is damaged.
    """
    verified(folder)
    prefix = f"{section}."
    described = CheckpointReader(folder).read_metadata().state_dict_metadata
    values = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if name.startswith(prefix) and hasattr(entry, "size") and hasattr(entry, "properties")
    }
    with _quietly():
        read_checkpoint(values, folder, alone=True)
    return {name.removeprefix(prefix): tensor for name, tensor in values.items()}


def checkpoint_of_step(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, below the folder of a run's checkpoints."""
    return folder / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


class _quietly(warnings.catch_warnings):  # noqa: N801
    """Silences PyTorch's warning about saving and loading in a single process."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process.*")
