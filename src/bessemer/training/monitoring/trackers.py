"""Experiment trackers: TensorBoard, Weights & Biases and trackio get the same records as `metrics.jsonl`."""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.config import Config
from bessemer.core.errors import ConfigError
from bessemer.core.metrics import Tracker
from bessemer.core.progress import Progress
from bessemer.core.store import read_json, write_json

#: Holds a run's name in every tracker, so that a resumed run continues there.
TRACKING = "tracking.json"


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError, with what to type, when a tracker's library is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # a module without an origin is only a folder of that name, such as W&B leaves behind
        if spec is None or spec.origin is None:
            raise ConfigError(f"track: {name} is not installed: pip install {name}")


def open_trackers(
    names: Sequence[str], out: Path, config: Config, *, project: str, resume_at: int, progress: Progress
) -> list[Tracker]:
    """The trackers of a run in `out`, from step `resume_at` on; unless that is 0, they continue the previous run.

    Raises ConfigError when one cannot be opened: its library is missing, or its login.
    """
    check_trackers(names)
    return [_Tolerant(name, _OPENERS[name](out, config, project, resume_at), progress) for name in names]


class _Tolerant:
    """A tracker whose failures, of a network or a server, do not end the run: it gets no records from then on."""

    def __init__(self, name: str, tracker: Tracker, progress: Progress) -> None:
        self._name = name
        self._tracker = tracker
        self._progress = progress
        self._failed = False

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._try(lambda: self._tracker.write(step, values))

    def close(self, *, failed: bool) -> None:
        self._try(lambda: self._tracker.close(failed=failed))

    def _try(self, act: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            act()
        except Exception as error:
            # clients raise errors of many types; metrics.jsonl has everything
            self._failed = True
            self._progress.say(f"  {self._name} gets no more records ({_first_line(error)}); metrics.jsonl has all of them")


class _TensorBoard:
    """Event files in the stage's own folder."""

    def __init__(self, out: Path, config: Config, project: str, resume_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=resume_at + 1 if resume_at else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of W&B, in the mode of the user's environment (`WANDB_MODE=offline`)."""

    def __init__(self, out: Path, config: Config, project: str, resume_at: int) -> None:
        name = _run_name(out)
        wandb = importlib.import_module("wandb")
        with _start_errors("wandb", "wandb login, or WANDB_MODE=offline in the environment"):
            self._run = wandb.init(project=project, id=name, name=name, resume="allow", config=config.model_dump(mode="json"))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    """A run of trackio, on this machine unless its environment names a Space."""

    def __init__(self, out: Path, config: Config, project: str, resume_at: int) -> None:
        self._trackio = importlib.import_module("trackio")
        with _start_errors("trackio", "see its documentation"):
            self._trackio.init(
                project=project, name=_run_name(out), resume="allow", config=config.model_dump(mode="json"), embed=False
            )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._trackio.finish()


_OPENERS: dict[str, Callable[[Path, Config, str, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "trackio": _Trackio,
}


class _start_errors:  # noqa: N801
    """Raises what a client raises at its start as a ConfigError of one line."""

    def __init__(self, name: str, remedy: str) -> None:
        self._name = name
        self._remedy = remedy

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise ConfigError(f"track: {self._name} does not start ({_first_line(error)}): {self._remedy}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _run_name(out: Path) -> str:
    """The name of a folder's run, chosen at its first start: that of the folder and six random hexadecimal digits."""
    place = out / TRACKING
    if not place.exists():
        write_json(place, {"run": f"{out.name.removesuffix('.partial')[:48]}-{secrets.token_hex(3)}"})
    return str(read_json(place, "name of a tracked run")["run"])
