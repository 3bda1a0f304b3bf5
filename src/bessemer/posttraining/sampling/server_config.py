"""Settings of rollouts by servers. Imports no PyTorch."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from bessemer.core.config import Config, setting

#: Kinds of servers: Bessemer's, two others whose routes for new weights are known, and `openai`, any other, which gets no new
#: weights.
ServerKind = Literal["auto", "bessemer", "vllm", "sglang", "openai"]

#: None of them changes what is trained, but for the order in which completions come.
_setting = partial(setting, affects_output=False)


class RolloutServers(Config):
    """Servers that sample completions while this process trains."""

    shorthand: ClassVar[str | None] = "servers"

    servers: list[str] = _setting(
        description="URLs of the model's servers, for example http://127.0.0.1:8000: `bessemer serve --accept-weights`, vLLM, "
        "SGLang, or another server of OpenAI's API with log-probabilities.",
        min_length=1,
    )
    kind: ServerKind = _setting("auto", "Kind of the servers; auto: recognised by their list of models.")
    model: str | None = _setting(None, "The servers' name of the model; absent: the first in their list.")
    key_variable: str = _setting(
        "", "Environment variable that holds the servers' API key; servers of Bessemer need an admin's key."
    )
    max_staleness: int = setting(
        0,
        "Most versions of the weights between sampling a token and training on it; each rollout is one version. 0: training "
        "waits for each rollout; above 0: servers sample later rollouts during training.",
        unit="versions",
        ge=0,
    )
    concurrency: int = _setting(16, "Prompts, or episodes, that each server gets at once.", ge=1)
    folder: str | None = _setting(
        None, "Folder for the weights of vLLM and SGLang, which the servers must be able to read; absent: in the run's folder."
    )
    weight_timeout: float = _setting(600.0, "Timeout of sending new weights to a server.", unit="s", gt=0)
    timeout: float = _setting(600.0, "Timeout of a completion, after which another server gets the request.", unit="s", gt=0)
    patience: float = _setting(
        900.0, "The run ends if no server answers for this long; complete groups are kept for the next start.", unit="s", gt=0
    )
