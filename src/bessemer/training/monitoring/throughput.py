"""How fast a run goes: tokens and floating-point operations a second, the share of the machine's peak, and the line that says
so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bessemer.model.config import ModelConfig
from bessemer.training.config import LoopConfig

#: Share of the newest step in the running speed that the progress line shows.
_SMOOTHING = 0.1


class Pace:
    """The speed of a run's steps. peak_flops: what all its devices together promise or were measured at, FLOP/s; None where
    nobody knows."""

    def __init__(self, config: LoopConfig, model: ModelConfig, peak_flops: float | None) -> None:
        self.tokens_per_step = config.batch_size * config.context_length
        self._flops_per_token = model.flops_per_token(config.context_length)
        self._peak_flops = peak_flops
        self._running = 0.0

    def step(self, seconds: float, waited: float) -> dict[str, float]:
        """Figures of a step that took `seconds`, of which it waited some for its data."""
        rate = self.tokens_per_step / seconds
        self._running += _SMOOTHING * (rate - self._running) if self._running else rate
        return {
            "tokens_per_second": round(rate),
            "gflops": round(rate * self._flops_per_token / 1e9, 1),
            **self.utilisation(rate),
            "data_wait": round(waited / seconds, 4),
        }

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu`: FLOPs that the model needs over those that the devices could do (Chowdhery et al. 2022, appendix B). Empty
        where the peak is not known."""
        if self._peak_flops is None:
            return {}
        return {"mfu": round(tokens_per_second * self._flops_per_token / self._peak_flops, 4)}

    def note(self, latest: Mapping[str, Any]) -> str:
        """What stands behind the bar: loss, bits per byte at the last validation, running speed."""
        parts = [f"loss {latest['loss']:.3f}"]
        if "bits_per_byte" in latest:
            parts.append(f"{latest['bits_per_byte']:.3f} bits/byte")
        parts.append(f"{self._running:,.0f} tokens/s")
        used = self.utilisation(self._running)
        parts.append(f"{used['mfu']:.0%} MFU" if used else f"{self._running * self._flops_per_token / 1e9:,.0f} GFLOP/s")
        return " · ".join(parts)
