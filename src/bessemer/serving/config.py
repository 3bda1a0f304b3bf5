"""Settings of the server."""

from __future__ import annotations

from bessemer.core.config import Config, setting


class ServingConfig(Config):
    """Address, API key and admission of the server."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 answers other machines too", affects_output=False)
    port: int = setting(8000, "port to listen on; 0 takes a free one", ge=0, le=65535, affects_output=False)
    api_key: str | None = setting(
        None,
        "key that clients must send as `Authorization: Bearer KEY`; none asks for none",
        min_length=1,
        affects_output=False,
    )
    max_waiting: int = setting(
        32,
        "completions that wait, beyond those that the engine computes at once; more are refused with 503",
        unit="completions",
        ge=0,
        affects_output=False,
    )
    suggestions: list[str] = setting(
        default_factory=list, description="questions that the chat page offers", affects_output=False
    )
