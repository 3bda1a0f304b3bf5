"""Processes of a stage that trains: which rank this one is, and how several are started.

`torchrun` and its like name the ranks in the environment. `launch` in a recipe starts them by PyTorch's elastic agent, which
starts them again when one dies. The rest of the recipe stays in the process that the user started. The workers run
`bessemer.pipeline.worker` with the same recipe, find everything above their stage finished, and make it together.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import BessemerError, ConfigError, ending_of_process
from bessemer.core.progress import Progress, Silent
from bessemer.distributed.layout import ParallelConfig
from bessemer.pipeline.recipe import LaunchConfig


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world_size`, and among those of its host.

    Rank 0 hashes, locks and publishes. All ranks work in a stage that trains; in any other they wait for rank 0.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.world_size == 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Ranks:
        """Read `RANK`, `WORLD_SIZE` and `LOCAL_RANK`; one process when they are absent. Raises ConfigError when they clash."""
        rank_text, world_text = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if not (rank_text.isdecimal() and world_text.isdecimal() and int(rank_text) < int(world_text)):
            raise ConfigError(f"the environment says RANK={rank_text} of WORLD_SIZE={world_text}, which is no rank")
        local_text = environment.get("LOCAL_RANK", "0")
        return cls(int(rank_text), int(world_text), int(local_text) if local_text.isdecimal() else 0)

    def device(self, name: str) -> str:
        """The device of this process where the recipe says `name`: of several GPUs the one of its local rank."""
        if self.alone or name not in ("auto", "cuda"):
            return name
        import torch

        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else name

    @contextmanager
    def joined(self, device: str, config: ParallelConfig) -> Iterator[None]:
        """While entered, the processes have joined; nothing is done for one alone, or where they have joined already."""
        if self.alone:
            yield
            return
        import torch.distributed as dist

        from bessemer.distributed.mesh import joined
        from bessemer.model.device import choose_device

        if dist.is_initialized():
            yield
            return
        with joined(choose_device(device), config.timeout):
            yield


#: Exit code of a worker that a user's mistake stopped: starting it again would only repeat it.
MISTAKE = 2


@dataclass(frozen=True)
class RunRequest:
    """The arguments of a run, which worker processes repeat. overrides: `KEY=VALUE` texts."""

    recipe: str
    overrides: tuple[str, ...]
    name: str
    runs: str
    allow_code: bool


def as_texts(overrides: Sequence[str] | Mapping[str, Any]) -> tuple[str, ...]:
    """Overrides as `KEY=VALUE` texts; JSON is YAML. A text alone is one override."""
    if isinstance(overrides, Mapping):
        return tuple(f"{key}={json.dumps(value)}" for key, value in overrides.items())
    return (overrides,) if isinstance(overrides, str) else tuple(overrides)


def processes_here(config: LaunchConfig) -> int:
    """How many processes `launch` asks for on this host."""
    if config.processes != "auto":
        return config.processes
    if "torch" not in sys.modules and not _may_have_gpus():
        return 1
    try:
        import torch
    except ImportError:
        return 1
    return max(1, torch.cuda.device_count())


def launcher(
    config: LaunchConfig, request: RunRequest, folder: Path, progress: Progress | None
) -> Callable[[str], None] | None:
    """Makes a stage, by its name, in the processes that `launch` asks for; None when it asks for one."""
    processes = processes_here(config)
    if processes == 1 and config.nodes == 1:
        return None

    def launch(stage: str) -> None:
        _launch(config, processes, request, stage, folder, progress or Silent())

    return launch


def _may_have_gpus() -> bool:
    """Whether it is worth loading PyTorch to count GPUs."""
    return Path("/dev/nvidia0").exists() or bool(os.environ.get("CUDA_VISIBLE_DEVICES"))


def _launch(config: LaunchConfig, processes: int, request: RunRequest, stage: str, folder: Path, progress: Progress) -> None:
    """Start the workers and wait for them. Raises BessemerError with what stopped them, after the last restart."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as Elastic
    from torch.distributed.launcher.api import elastic_launch

    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    mistake = logs / "mistake.txt"
    for attempt in range(config.restarts + 1):
        mistake.unlink(missing_ok=True)
        elastic = Elastic(
            min_nodes=config.nodes,
            max_nodes=config.nodes,
            nproc_per_node=processes,
            run_id=f"{request.name}-{stage}-{attempt}",
            rdzv_backend="c10d",
            rdzv_endpoint=config.rendezvous or "localhost:0",
            max_restarts=0,  # restarts are decided below
            # rank 0 writes to the terminal, the others to files
            logs_specs=DefaultLogsSpecs(str(logs), redirects=dict.fromkeys(range(1, processes), Std.ALL)),
        )
        arguments = ["-m", "bessemer.pipeline.worker", json.dumps(asdict(request) | {"stage": stage, "mistake": str(mistake)})]
        try:
            elastic_launch(elastic, sys.executable)(*arguments)
            return
        except ChildFailedError as error:
            if mistake.exists():
                raise BessemerError(mistake.read_text(encoding="utf-8")) from None
            rank, failure = error.get_first_failure()
            what = f"{stage}: process {rank} ended with {ending_of_process(failure.exitcode)}"
            if attempt == config.restarts:
                raise BessemerError(f"{what}, {config.restarts + 1} times; its output is below {logs}") from None
            progress.say(f"{what}; all are started again and go on from the last checkpoint")
