"""Out of memory: one line that says what was asked for and what would fit, in place of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bessemer.core.environment import available_memory_bytes
from bessemer.core.errors import BessemerError, asked_memory
from bessemer.core.figures import size
from bessemer.core.stage import StageContext
from bessemer.core.store import read_json

if TYPE_CHECKING:
    from bessemer.scaling.hardware import Card


class OutOfMemoryError(BessemerError):
    """A stage that trains needs more memory than there is."""


@contextmanager
def memory_advice(context: StageContext) -> Iterator[None]:
    """While entered, an allocation that fails raises OutOfMemoryError: what was asked, what would fit, what is kept."""
    try:
        yield
    except BessemerError:
        raise
    except Exception as error:
        asked = asked_memory(error)
        if asked is None:
            raise
        raise OutOfMemoryError(_message(context, asked)) from error


def _message(context: StageContext, asked: int) -> str:
    from bessemer.training.checkpoint.manager import CHECKPOINTS, newest_checkpoint

    wanted = f"while it asked for {size(asked)} more" if asked else "while it asked for more"
    checkpoint = newest_checkpoint(context.out / CHECKPOINTS)
    message = f"out of memory {wanted}; {_what_would_fit(context)}"
    if checkpoint is None:
        return message
    step = int(checkpoint.name.rpartition("-")[2])
    return f"{message}; the checkpoint of step {step:,} is kept, and the same run goes on from it"


def _what_would_fit(context: StageContext) -> str:
    import torch.distributed as dist

    from bessemer.distributed.layout import Layout
    from bessemer.model.folder_config import read_model_config
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
    """The card that a stage runs on, or the most like it, and the bytes that tensors may take there."""
    import torch

    from bessemer.model.device import choose_device
    from bessemer.scaling.hardware import USABLE_MEMORY, card_of_device, find_card

    device = choose_device(name)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return card_of_device(torch.cuda.get_device_name(device)) or find_card("a100"), total * USABLE_MEMORY
    return find_card("cpu"), float(available_memory_bytes() or find_card("cpu").memory)
