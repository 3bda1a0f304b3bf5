"""Settings of the Tinker server, and its limits of size and time. Imports no PyTorch."""

from __future__ import annotations

from typing import Literal

from bessemer.core.config import Config, setting

#: Seconds that a client's request for a result is held open; the client gives up after 45.
ANSWER_SECONDS = 20.0
#: Results are kept for clients that ask again: how many, and how many bytes in all.
KEPT_ANSWERS, KEPT_BYTES = 20_000, 1 << 28
#: Requests of one run that may wait for their turn.
MOST_WAITING = 4096
#: Most sampling requests that wait; further ones are refused with 429.
MOST_SAMPLING = 16_384
#: Seconds between two checks for silent sessions and expired weights.
UPKEEP_SECONDS = 30.0
#: Largest rank of an adapter.
LARGEST_RANK = 1024
#: Most samples of one request, and most likeliest tokens beside each.
MOST_SAMPLES, MOST_LIKELIEST = 1024, 100


class TrainingSettings(Config):
    """How all runs of a server are computed."""

    device: str = setting("auto", "auto, cpu, cuda or mps", affects_output=False)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype of matmuls, and of the frozen matrices")
    micro_batch_tokens: int = setting(
        2048, "tokens of a micro-batch, padding included", unit="tokens", affects_output=False, ge=1
    )
    recompute: bool = setting(False, "recompute the blocks in the backward pass: less memory, more time", affects_output=False)


class TinkerLimits(Config):
    """What a Tinker server holds at once."""

    max_runs: int = setting(8, "most training runs in memory", unit="runs", affects_output=False, ge=1)
    max_adapters: int = setting(16, "saved weights that are loaded for sampling", unit="adapters", affects_output=False, ge=1)
    snapshots: int = setting(
        8, "copies of a run's weights that were saved for sampling without a name", unit="adapters", affects_output=False, ge=1
    )
    idle_minutes: float = setting(
        30.0,
        "time without a sign of a client after which its runs leave the memory",
        unit="minutes",
        affects_output=False,
        gt=0,
    )
