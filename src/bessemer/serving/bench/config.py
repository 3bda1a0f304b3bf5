"""Settings of a load test. Imports no client."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, setting

#: What a limit of `goodput` may be on.
GOALS = ("ttft", "tpot", "e2el")


class LoadConfig(Config):
    """A load test: what is asked, how often, and when an answer was good."""

    model: str | None = setting(None, "name of the model; the first that the server lists")
    api: Literal["completions", "chat"] = setting("completions", "API that is asked: completions, or chat")
    requests: int = setting(100, "requests that are measured", ge=1)
    warmup: int = setting(2, "requests before them that are not", ge=0)
    concurrency: int | None = setting(
        None, "clients, each of which asks again when it has its answer; with rate the most at once", ge=1
    )
    rate: float | None = setting(
        None, "requests a second that arrive whether or not others are answered", unit="requests/s", gt=0
    )
    burstiness: float = setting(1.0, "shape of the gamma distribution of arrivals: 1 is Poisson, below it bursts come", gt=0)
    input_tokens: int = setting(256, "words of a prompt, about as many tokens", unit="words", ge=1)
    output_tokens: int = setting(128, "most tokens of an answer", unit="tokens", ge=1)
    prompts: Path | None = setting(
        None, "file of prompts instead, JSON lines of {prompt}, a text or token ids, or of {messages}; taken in turn"
    )
    ignore_eos: bool = setting(True, "ask for answers of exactly that length, as vLLM, llama.cpp and Bessemer give them")
    temperature: float = setting(0.0, "temperature of sampling", ge=0)
    top_p: float | None = setting(None, "nucleus of sampling", gt=0, le=1)
    extra_body: dict[str, Any] = setting(
        default_factory=dict, description="fields of the request beside these, as a server's own sampling settings"
    )
    seed: int = setting(0, "seed of prompts and arrivals")
    goodput: dict[str, float] = setting(
        default_factory=dict, description="limits that an answer must all meet to be good, by ttft, tpot or e2el", unit="ms"
    )
    timeout: float = setting(600.0, "time for an answer", unit="s", gt=0)

    @field_validator("goodput")
    @classmethod
    def _check_goals(cls, limits: dict[str, float]) -> dict[str, float]:
        for name, limit in limits.items():
            if name not in GOALS or not limit > 0:
                raise ValueError(f"goodput {name}:{limit:g}: it is {', '.join(GOALS)} and milliseconds, as ttft:200")
        return limits

    @model_validator(mode="after")
    def _check_arrivals(self) -> Self:
        if self.concurrency is None and self.rate is None:
            raise ValueError("give concurrency, for clients that wait for their answers, or rate, for requests that arrive")
        return self
