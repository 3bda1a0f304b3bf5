"""Settings of the server."""

from __future__ import annotations

from pathlib import Path

from bessemer.core.config import Config, setting
from bessemer.serving import limits


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
    keys: Path | None = setting(None, "file of API keys, by `bessemer keys`; read again when it changes", affects_output=False)
    hosts: list[str] = setting(
        default_factory=list,
        description="names under which clients may address the server, beside localhost and addresses of numbers; * is any",
        affects_output=False,
    )
    origins: list[str] = setting(
        default_factory=list,
        description="origins, as https://example.org, whose pages may use the server from a browser",
        affects_output=False,
    )
    max_body: float = setting(
        float(limits.BODY.most), "size of a request above which it is refused with 413", unit="MiB", gt=0, affects_output=False
    )
    body_seconds: float = setting(
        float(limits.BODY_WAIT.most),
        "time for the body of a request, after which it is refused with 408",
        unit="s",
        gt=0,
        affects_output=False,
    )
    drain_seconds: float = setting(
        60.0, "time for the running requests to finish after SIGTERM", unit="s", ge=0, affects_output=False
    )
    request_log: bool = setting(
        False,
        "log a line of JSON for every request: key, path, status, times and tokens, and nothing that it says",
        affects_output=False,
    )
    adapter_root: Path | None = setting(
        None, "folder below which an admin key may load adapters while the server runs", affects_output=False
    )
    aliases: list[str] = setting(
        default_factory=list, description="other names under which clients may ask for the model", affects_output=False
    )
    max_waiting: int = setting(
        limits.WAITING.most,
        "completions that wait, beyond those that the engine computes at once; more are refused with 503",
        unit="completions",
        ge=0,
        affects_output=False,
    )
