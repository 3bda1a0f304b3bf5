"""Settings of a model that writes or judges data. Imports no PyTorch."""

from __future__ import annotations

from bessemer.core.config import setting
from bessemer.tasks.judged import JudgeConfig

#: Why a row is left out of which a part that would be learnt came to `max_tokens`: it would be learnt as one that ends there.
CUT_REASON = "cut at max_tokens"


class ChatModelConfig(JudgeConfig):
    """A model that is asked: at an OpenAI-compatible URL, or a model's folder on this machine."""

    max_tokens: int = setting(512, "longest answer", unit="tokens", ge=1)
    temperature: float = setting(0.0, "of its answers; 0: the likeliest token each time", ge=0, allow_inf_nan=False)
