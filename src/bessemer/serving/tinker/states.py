"""Training runs and their saved weights on disk, which a client finds again after a restart of the server.

    FOLDER/RUN/run.json                    who owns it, its base model, its adapter, when it was last used
    FOLDER/RUN/weights/NAME/               the adapter and AdamW's averages: training goes on from here
    FOLDER/RUN/sampler_weights/NAME/       the adapter as PEFT writes it, which `bessemer serve --adapter` and others open too

A checkpoint is complete or absent. Its address is `tinker://RUN/weights/NAME`, or `…/sampler_weights/NAME`.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.core.store import check_format, folder_bytes, new_folder, read_json, write_json
from bessemer.model.adapters import Adapter
from bessemer.model.adapters.folder import write_adapter
from bessemer.model.decoder import Decoder
from bessemer.serving.tinker.training import LoraSettings

_FORMAT = 1
_RUN, _CHECKPOINT, _STATE = "run.json", "checkpoint.json", "state.safetensors"
#: Suffix of a folder of weights that is complete and not renamed yet.
_NEW = ".new"
#: A name that a client may give to weights: one part of a path, which cannot lead out of its folder.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
#: The id of a run: that of its session, `:train:` and its number there.
_RUN_ID = re.compile(r"[0-9a-f]{32}:train:[0-9]{1,9}")
_ADDRESS = re.compile(r"tinker://([^/]+)/(weights|sampler_weights)/([^/]+)")

#: What weights were saved for: to continue training, or to sample.
Kind = Literal["weights", "sampler_weights"]


@dataclass(frozen=True)
class Address:
    """Where saved weights are."""

    run: str
    kind: Kind
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises RequestError for a text that is no address."""
        match = _ADDRESS.fullmatch(text)
        if match is None or not _RUN_ID.fullmatch(match[1]) or not _NAME.fullmatch(match[3]):
            raise RequestError(f"{text[:200]!r} is no address of weights: tinker://RUN/weights/NAME, or /sampler_weights/NAME")
        return cls(match[1], "weights" if match[2] == "weights" else "sampler_weights", match[3])

    @property
    def checkpoint_id(self) -> str:
        return f"{self.kind}/{self.name}"

    def __str__(self) -> str:
        return f"tinker://{self.run}/{self.checkpoint_id}"


@dataclass
class RunRecord:
    """Description of a run. owner: id of its client. created, used: seconds since 1970."""

    id: str
    owner: str
    base_model: str
    lora: LoraSettings
    user_metadata: Mapping[str, Any] = field(default_factory=dict)
    created: float = 0.0
    used: float = 0.0


@dataclass(frozen=True)
class SavedWeights:
    """A checkpoint. expires: seconds since 1970; None: never."""

    address: Address
    lora: LoraSettings
    base_model: str
    steps: int
    time: float
    size: int
    expires: float | None = None
    user_metadata: Mapping[str, Any] = field(default_factory=dict)


class StateStore:
    """The folder of all runs. Its methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        for path in folder.glob(f"*/*/.*{_NEW}/{_CHECKPOINT}"):
            new = path.parent
            self._put(new, new.with_name(new.name[1:].removesuffix(_NEW)))

    def add_run(self, record: RunRecord) -> None:
        """Write a run, or write it anew."""
        folder = self._folder(record.id)
        with self._lock:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _RUN, {"format": _FORMAT, **asdict(record)})

    def run(self, id: str, owner: str | None = None) -> RunRecord:
        """A run of an owner; None: of any owner. Raises RequestError where there is none; a run of another client gives the
        same error."""
        missing = RequestError(f"there is no training run {id[:80]!r}")
        if not _RUN_ID.fullmatch(id):
            raise missing
        path = self._folder(id) / _RUN
        if not path.exists():
            raise missing
        written = read_json(path, "training run")
        check_format(written.pop("format", None), _FORMAT, path, "training run")
        record = RunRecord(**{**written, "lora": LoraSettings(**written["lora"])})
        if owner is not None and record.owner != owner:
            raise missing
        return record

    def runs(self, owner: str) -> list[RunRecord]:
        """All runs of an owner, the one that was used last first."""
        found = []
        for path in self.folder.glob(f"*/{_RUN}"):
            try:
                record = self.run(_id_of(path.parent.name))
            except (RequestError, ArtefactError):
                continue
            if record.owner == owner:
                found.append(record)
        return sorted(found, key=lambda record: -record.used)

    def checkpoints(self, run: str) -> list[SavedWeights]:
        """The weights of a run that have not expired, the newest first."""
        found = []
        for kind in ("weights", "sampler_weights"):
            for path in (self._folder(run) / kind).glob(f"*/{_CHECKPOINT}"):
                try:
                    found.append(self.find(Address(run, kind, path.parent.name)))
                except (RequestError, ArtefactError):
                    continue
        return sorted(found, key=lambda saved: -saved.time)

    def find(self, address: Address) -> SavedWeights:
        """Raises RequestError where there are no such weights, or they have expired; ArtefactError where they are damaged."""
        folder = self.path(address)
        if not (folder / _CHECKPOINT).exists():
            raise RequestError(f"{address}: there are no such weights")
        written = read_json(folder / _CHECKPOINT, "checkpoint")
        check_format(written.pop("format", None), _FORMAT, folder / _CHECKPOINT, "checkpoint")
        saved = SavedWeights(**{**written, "address": address, "lora": LoraSettings(**written["lora"])})
        if saved.expires is not None and saved.expires < time.time():
            raise RequestError(f"{address}: these weights have expired")
        return saved

    def path(self, address: Address) -> Path:
        """The folder of saved weights."""
        return self._folder(address.run) / address.kind / address.name

    def save_state(
        self, record: RunRecord, name: str, tensors: Mapping[str, Tensor], *, steps: int, overwrite: bool, **more: Any
    ) -> SavedWeights:
        """Save a state from which training can continue. more: `expires`, `user_metadata`. Raises as `_saving`."""
        with self._saving(record, "weights", name, steps=steps, overwrite=overwrite, **more) as folder:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / _STATE, metadata={"format": "pt"})
        return self.find(Address(record.id, "weights", name))

    def save_sampler(
        self, record: RunRecord, name: str, adapter: Adapter, model: Decoder, *, steps: int, **more: Any
    ) -> SavedWeights:
        """Save weights for sampling; replaces weights of the same name. more: as for `save_state`."""
        with self._saving(record, "sampler_weights", name, steps=steps, overwrite=True, **more) as folder:
            write_adapter(adapter, model, folder)
        return self.find(Address(record.id, "sampler_weights", name))

    def load_state(self, address: Address) -> dict[str, Tensor]:
        """The tensors of a saved state. Raises RequestError for weights that were saved for sampling, ArtefactError for a
        damaged file."""
        if address.kind != "weights":
            raise RequestError(f"{address}: these weights are for sampling; training goes on from those of save_state")
        path = self.path(address) / _STATE
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path}: this state is damaged ({error}); take another checkpoint of the run") from None

    def set_expiry(self, address: Address, expires: float | None) -> None:
        """Raises as `find`."""
        with self._lock:
            self.find(address)
            path = self.path(address) / _CHECKPOINT
            write_json(path, {**read_json(path), "expires": expires})

    def remove(self, address: Address) -> None:
        """Delete saved weights. Raises as `find`."""
        with self._lock:
            self.find(address)
            self._delete(self.path(address))

    def remove_expired(self) -> int:
        """Delete weights that have expired; returns how many."""
        removed, now = 0, time.time()
        for path in self.folder.glob(f"*/*/*/{_CHECKPOINT}"):
            with self._lock:
                try:
                    expires = read_json(path, "checkpoint").get("expires")
                except ArtefactError:
                    # removed meanwhile, or damaged, which `find` reports
                    continue
                if expires is not None and expires < now:
                    self._delete(path.parent)
                    removed += 1
        return removed

    # -- inside

    def _folder(self, run: str) -> Path:
        # not every system allows a colon in a file's name
        return self.folder / run.replace(":", "-")

    @contextmanager
    def _saving(
        self,
        record: RunRecord,
        kind: Kind,
        name: str,
        *,
        steps: int,
        overwrite: bool,
        expires: float | None = None,
        user_metadata: Mapping[str, Any] | None = None,
    ) -> Iterator[Path]:
        """A new folder of weights. Those that have the name already stay until the new ones are whole.

        Raises RequestError where the name is taken and `overwrite` is false, and for a name that weights may not have.
        """
        address = Address(record.id, kind, checked_name(name))
        final = self.path(address)
        with self._lock:
            if (final / _CHECKPOINT).exists() and not overwrite:
                raise RequestError(f"{address}: there are such weights already; choose another name, or set overwrite")
            new = final.with_name(f".{name}{_NEW}")
            shutil.rmtree(new, ignore_errors=True)
            with new_folder(new) as partial:
                yield partial
                values = {
                    "format": _FORMAT,
                    "lora": asdict(record.lora),
                    "base_model": record.base_model,
                    "steps": steps,
                    "time": time.time(),
                    "size": folder_bytes(partial),
                    "expires": expires,
                    "user_metadata": dict(user_metadata or {}),
                }
                write_json(partial / _CHECKPOINT, values)
            self._put(new, final)

    def _put(self, new: Path, final: Path) -> None:
        """Rename complete new weights to their name; `__init__` finishes that after a crash."""
        if final.exists():
            self._delete(final)
        new.rename(final)

    def _delete(self, folder: Path) -> None:
        """The checkpoint's own file goes first, so that no reader takes a half-deleted folder for a whole one."""
        (folder / _CHECKPOINT).unlink(missing_ok=True)
        shutil.rmtree(folder)


def checked_name(name: str) -> str:
    """Raises RequestError for a name that weights may not have."""
    if not _NAME.fullmatch(name):
        raise RequestError(f"{name[:80]!r} is no name of weights: letters, digits, . _ and -, at most 128 of them")
    return name


def _id_of(folder: str) -> str:
    session, _, number = folder.rpartition("-train-")
    return f"{session}:train:{number}"


def iso_time(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()
