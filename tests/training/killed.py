"""A run that dies by `kill -9` at a place that is given."""

import os
import signal
from pathlib import Path

import bessemer.training.checkpoint.manager as checkpoint
import bessemer.training.monitoring.profiler as profiler
import bessemer.training.trainer as trainer
from bessemer.training.pretrain import pretrain
from bessemer.training.pretrain_config import PretrainConfig

#: By place: what is called there, the number of the call, and whether the process dies before it.
PLACES = {
    "before the first step": (trainer, "clip_gradients", 1, True),
    "after the optimizer": (trainer, "step_optimizers", 4, False),
    "inside a checkpoint": (checkpoint, "hash_files", 6, True),
}


def pretrain_and_die(place: str | None, config: PretrainConfig, model: Path, tokens: Path, out: Path) -> None:
    """Pretrain in this process, which dies on the way where a place is given."""
    if place is not None:
        module, name, number, before = PLACES[place]
        function, calls = getattr(module, name), []

        def dying(*arguments, **options):
            calls.append(1)
            if len(calls) == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, dying)
    # what it measures takes longer than its steps
    profiler.measured_peak = lambda runtime: 1e9
    pretrain(config, model, tokens, out, seed=3, device="cpu")
