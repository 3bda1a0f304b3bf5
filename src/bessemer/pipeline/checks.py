"""What a stage needs of this machine: checks before any stage runs, and advice when memory runs out.

Checked are packages, the user's code, a device, and a layout that fits the model. Out of memory is
one line with the requested bytes and settings that would fit, in place of a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bessemer.core.environment import available_memory_bytes, missing_package
from bessemer.core.errors import BessemerError, ConfigError, failed_allocation
from bessemer.core.metrics import size
from bessemer.core.stage import StageContext
from bessemer.core.store import read_json
from bessemer.core.usercode import load_user_function
from bessemer.pipeline.planning import model_of
from bessemer.pipeline.recipe import Recipe, Stage, feeding
from bessemer.pipeline.stages import SERVICES
from bessemer.training.config import LoopConfig
from bessemer.training.monitoring.run_metrics import check_processes, open_tasks

if TYPE_CHECKING:
    from bessemer.scaling.hardware import Card


_DEVICES_EVERYWHERE = ("auto", "cpu")


def check_stage(recipe: Recipe, stage: Stage, device: str, processes: int) -> None:
    """Raise ConfigError, one line that names the stage, for the first thing that is missing or does not fit.

    processes: how many make a stage that trains.
    """
    try:
        missing = missing_package(stage.spec.packages(stage.config))
        if missing is not None:
            raise ConfigError(missing)
        for function in stage.user_functions:
            load_user_function(function, recipe.folder)
        stage.spec.check(stage.config)
        if device not in _DEVICES_EVERYWHERE and any(source.kind == "model" for source in stage.inputs.values()):
            from bessemer.model.device import choose_device

            choose_device(device)
        if isinstance(stage.config, LoopConfig):
            if open_tasks(stage.config, recipe.folder, SERVICES.tasks) is not None:
                check_processes(processes)
            _check_layout(recipe, stage, stage.config, processes)
    except BessemerError as error:
        raise ConfigError(f"{stage.name}: {error}") from None


def _check_layout(recipe: Recipe, stage: Stage, config: LoopConfig, processes: int) -> None:
    """Raise ConfigError when a number of processes cannot share the model, its rows or their tokens as the settings say."""
    from bessemer.distributed.layout import Layout

    layout = Layout.of(config.parallel, processes)
    if layout.world_size == 1:
        return
    rows = layout.rows(0, config.batch_size)
    if (conflict := config.rows_conflict(layout.data_ranks, config.micro_batch_size)) is not None:
        raise ConfigError(conflict)
    layout.columns(0, config.context_length)
    if layout.pipeline > 1:
        layout.micro_batches(rows.stop - rows.start, config.micro_batch_size, config.parallel.pipeline_schedule)
    model = model_of(recipe.folder, feeding(recipe.stages, stage))
    if model is not None:
        # a tokenizer may come out smaller than its settings say: the vocabulary is supposed to divide among the ranks
        layout.check(model.with_changes(vocab_size=model.vocab_size * layout.tensor), config.context_length)


class OutOfMemoryError(BessemerError):
    """A stage that trains needs more memory than there is."""


@contextmanager
def memory_advice(context: StageContext) -> Iterator[None]:
    """While entered, a failed allocation raises OutOfMemoryError with its size, settings that would fit, and what is kept."""
    try:
        yield
    except BessemerError:
        raise
    except Exception as error:
        requested = failed_allocation(error)
        if requested is None:
            raise
        raise OutOfMemoryError(_message(context, requested)) from error


def _message(context: StageContext, requested: int) -> str:
    from bessemer.training.checkpoint.manager import CHECKPOINTS, newest_checkpoint

    wanted = f"while it asked for {size(requested)} more" if requested else "while it asked for more"
    checkpoint = newest_checkpoint(context.out / CHECKPOINTS)
    message = f"out of memory {wanted}; {_what_would_fit(context)}"
    if checkpoint is None:
        return message
    step = int(checkpoint.name.rpartition("-")[2])
    return f"{message}; the checkpoint of step {step:,} is kept, and the same run goes on from it"


def _what_would_fit(context: StageContext) -> str:
    import torch.distributed as dist

    from bessemer.distributed.layout import Layout
    from bessemer.model.storage.model_config import read_model_config
    from bessemer.scaling.job import Candidate
    from bessemer.scaling.planner import suggest_settings
    from bessemer.training.autotune import AUTOTUNE

    settings = context.config
    started = context.out / AUTOTUNE
    if started.exists():
        settings = settings.with_changes(dtype=read_json(started, "record of a run's start")["dtype"])
    layout = Layout.of(settings.parallel, dist.get_world_size() if dist.is_initialized() else 1)
    rows = settings.batch_size // layout.data_ranks
    failed = Candidate(layout, min(settings.micro_batch_size or rows, rows), settings.activation_checkpointing)
    card, memory = _device(context.device)
    return suggest_settings(read_model_config(context.inputs["model"]), settings, memory, card, layout, failed=failed)


def _device(name: str) -> tuple[Card, float]:
    """The stage's device as a card of the planner, or the nearest one, and the bytes that tensors may take there."""
    import torch

    from bessemer.model.device import choose_device
    from bessemer.scaling.hardware import USABLE_MEMORY, card_of_device, find_card

    device = choose_device(name)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return card_of_device(torch.cuda.get_device_name(device)) or find_card("a100"), total * USABLE_MEMORY
    return find_card("cpu"), float(available_memory_bytes() or find_card("cpu").memory)
