"""Settings of rollouts by servers. Imports no PyTorch."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from bessemer.core.config import Config, setting

#: Kinds of servers: ours, and two whose routes for new weights are known; `openai` is any other, which is sent none.
ServerKind = Literal["auto", "bessemer", "vllm", "sglang", "openai"]

#: None of them changes what is trained, but for the order in which completions come.
_setting = partial(setting, affects_output=False)


class RolloutServers(Config):
    """Servers that sample completions while this process trains."""

    shorthand: ClassVar[str | None] = "servers"

    servers: list[str] = _setting(
        description="URLs of servers of the model (http://127.0.0.1:8000): `bessemer serve --accept-weights`, vLLM, SGLang, "
        "or another that speaks OpenAI's API with log-probabilities.",
        min_length=1,
    )
    kind: ServerKind = _setting("auto", "What they are; auto: what their list of models says.")
    model: str | None = _setting(None, "The model's name on them; absent: the first of their list.")
    key_variable: str = _setting("", "Environment variable that holds their key, an admin's where they are ours.")
    max_staleness: int = setting(
        0,
        "By how many versions of the weights a token may be older than those that it trains; a version is what one rollout is "
        "made with. 0: training waits for each rollout; above 0 servers sample the next ones meanwhile.",
        unit="versions",
        ge=0,
    )
    concurrency: int = _setting(16, "Prompts, or episodes, that are under way on each server at once.", ge=1)
    folder: str | None = _setting(
        None, "Where weights for vLLM and SGLang are written, a folder that they see too; absent: beside the run."
    )
    weight_timeout: float = _setting(600.0, "Time for a server to take new weights.", unit="s", gt=0)
    timeout: float = _setting(600.0, "Time for a completion, after which another server is asked.", unit="s", gt=0)
    patience: float = _setting(
        900.0, "How long no server may answer before the run ends; what is complete is kept for the next start.", unit="s", gt=0
    )
