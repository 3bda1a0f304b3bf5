"""Training throughput: tokens and FLOP a second, model FLOPs utilisation, and the text of the progress line."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from bessemer.model.config import ModelConfig
from bessemer.training.config import LoopConfig

#: Beginning of the keys of accuracies on tasks in `metrics.jsonl`; the task's name follows.
TASK = "task/"

#: Weight of the newest step in the moving average that the progress line shows.
_SMOOTHING = 0.1


class Throughput:
    """Throughput of a run's steps. peak_flops: of all its devices together, vendor figure or measured, FLOP/s; None:
    unknown."""

    def __init__(self, config: LoopConfig, model: ModelConfig, peak_flops: float | None) -> None:
        self._flops_per_token = model.flops_per_token(config.context_length)
        self._peak_flops = peak_flops
        #: Moving average of tokens per second.
        self._average = 0.0

    def add_step(self, tokens: int, seconds: float, waited: float) -> dict[str, float]:
        """Metrics of a step of `tokens` that took `seconds`, of which `waited` were spent waiting for data."""
        rate = tokens / seconds
        self._average += _SMOOTHING * (rate - self._average) if self._average else rate
        return {
            "tokens_per_second": round(rate),
            "gflops": round(rate * self._flops_per_token / 1e9, 1),
            **self.utilisation(rate),
            "data_wait": round(waited / seconds, 4),
        }

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu`: FLOPs of the model over the peak of the devices (Chowdhery et al. 2022, appendix B). Empty where the peak is
        unknown."""
        if self._peak_flops is None:
            return {}
        return {"mfu": round(tokens_per_second * self._flops_per_token / self._peak_flops, 4)}

    def progress_line(self, latest: Mapping[str, Any]) -> str:
        """Text beside the progress bar: loss, bits per byte or loss of the last validation, accuracy on the tasks, of several
        their mean, average throughput."""
        parts = [f"loss {latest['loss']:.3f}"]
        if "bits_per_byte" in latest:
            parts.append(f"{latest['bits_per_byte']:.3f} bits/byte")
        elif "validation_loss" in latest:
            parts.append(f"{latest['validation_loss']:.3f} held out")
        accuracies = {name.removeprefix(TASK): value for name, value in latest.items() if name.startswith(TASK)}
        if accuracies:
            what = next(iter(accuracies)) if len(accuracies) == 1 else f"of {len(accuracies)} tasks"
            parts.append(f"{fmean(accuracies.values()):.1%} {what}")
        parts.append(f"{self._average:,.0f} tokens/s")
        used = self.utilisation(self._average)
        parts.append(f"{used['mfu']:.0%} MFU" if used else f"{self._average * self._flops_per_token / 1e9:,.0f} GFLOP/s")
        return " · ".join(parts)
