"""Settings of the server, and all its limits on size and time.

A request is checked against the limits before anything is computed, and refused with the limit that it exceeds. A test compares
the table in `docs/serving.md` with this list.
"""

from __future__ import annotations

import ipaddress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import model_validator

from bessemer.core.config import Config, setting


class Limit(NamedTuple):
    """A limit. beyond: the consequence of exceeding it; setting: the option that changes it."""

    most: int
    unit: str
    of: str
    beyond: str
    setting: str = ""

    @property
    def row(self) -> str:
        """Its row in the table of `docs/serving.md`."""
        return f"| {self.of} | {self.most:,} {self.unit} | {self.beyond} | {self.setting or '–'} |"


# -- a body, before it is parsed

#: A body up to this many bytes is parsed on the event loop: faster than starting a thread.
PARSED_AT_ONCE = 1 << 14

BODY = Limit(8, "MiB", "a body", "413", "`--max-body`")
BODY_WAIT = Limit(30, "s", "until a body has come", "408", "`ServingConfig.body_seconds`")
BODIES = Limit(512, "MiB", "bodies of all requests under way together, those up to 64 KiB aside", "503 with `Retry-After`")
#: Bytes of each body that `BODIES` does not count, so that many large bodies keep no ordinary request away.
UNCOUNTED = 1 << 16
HEAD_WAIT = Limit(10, "s", "until the head of a request has come", "the connection is closed")
WRITE_WAIT = Limit(
    30, "s", "for a client to read 16 KiB of an answer that waits for it", "the connection and its requests are ended"
)
#: Bytes that a client must read in `WRITE_WAIT`.
LEAST_READ = 1 << 14
VALUES = Limit(1_000_000, "values", "numbers, texts, lists and objects of a body", "400")
CONTAINERS = Limit(50_000, "lists and objects", "lists and objects of a body", "400")

# -- a request

NAME = Limit(1_024, "characters", "the name of a model or of an earlier response", "400")
FIELDS = Limit(1_000, "names", "names in an object whose names are known", "400")
MESSAGES = Limit(10_000, "messages", "messages of a conversation, or items of an input", "400")
TOOLS = Limit(128, "tools", "`tools`, and the calls of a message", "400")
CHOICES = Limit(128, "answers", "`n` and `best_of`", "400")
ANSWERS = Limit(2_048, "answers", "answers to all prompts of a request", "400")
LIKELIEST = Limit(20, "tokens", "`logprobs` and `top_logprobs`: likeliest tokens beside each", "400")
STOPS = Limit(1_024, "texts", "`stop`, `stop_sequences`", "400")
STOP_CHARACTERS = Limit(16_384, "characters", "all texts of `stop` or `stop_sequences` together", "400")
STOP_TOKENS = Limit(1_024, "ids", "`stop_token_ids`", "400")
TOKEN_RULES = Limit(300_000, "ids", "`allowed_token_ids` and `logit_bias`, each", "400")
IMAGES = Limit(16, "pictures", "pictures of a conversation", "400")
EMBEDDED = Limit(2_048, "texts", "texts to embed", "400")
ENCODED = Limit(1_000_000, "characters", "texts of `/tokenize` and `/v1/messages/count_tokens`", "400")
METADATA = Limit(16, "pairs", "`metadata` of a response", "400")
METADATA_KEY = Limit(64, "characters", "a name in `metadata` of a response", "400")
METADATA_VALUE = Limit(512, "characters", "a value in `metadata` of a response", "400")
SEARCHED_STORES = Limit(16, "vector stores", "vector stores that one search looks in", "400")
RESULTS = Limit(50, "passages", "`max_num_results` of a search", "400")
QUERIES = Limit(16, "texts", "queries of a search of a vector store", "400")
FILTERS = Limit(64, "conditions", "conditions of a filter, and values of one", "400")
BATCHED = Limit(500, "files", "files that one request adds to a vector store", "400")
RERANKED = Limit(1_024, "texts", "texts to rerank or to score", "400")

# -- the server

WAITING = Limit(
    32,
    "completions",
    "completions that wait beside those that are computed",
    "the request waits in the queue",
    "`--max-waiting`",
)
#: A single request leaves 1 / `OTHERS_SHARE` of the waiting places to others.
OTHERS_SHARE = 4
QUEUED = Limit(
    256, "requests", "requests that wait for such a place, or for their model", "503 with `Retry-After`", "`--max-queued`"
)
QUEUE_WAIT = Limit(120, "s", "for a request to get its place or its model", "503 with `Retry-After`", "`--queue-seconds`")
ASIDE = Limit(2, "requests", "`/tokenize`, `/detokenize` and `count_tokens` that are computed at once", "the next one waits")
STORED = Limit(1_000, "responses", "stored responses", "the oldest of the key with the most bytes is dropped")
STORED_BYTES = Limit(256, "MiB", "stored responses together", "the oldest of the key with the most bytes is dropped")
SOCKETS = Limit(64, "connections", "open WebSockets of `/v1/responses`", "the connection is refused")
SOCKET_IDLE = Limit(600, "s", "for a WebSocket without a response under way", "the connection is closed")
SUMMARY = Limit(1_024, "tokens", "a summary by `/v1/responses/compact`", "it ends there")
UPLOADS = Limit(1_000, "files", "uploaded files of a key", "400")
UPLOADED_BYTES = Limit(1_024, "MiB", "uploaded files of a key together", "400")
STORES = Limit(1_000, "vector stores", "vector stores of a key", "400")

LIMITS: dict[str, Limit] = {name: value for name, value in list(globals().items()) if isinstance(value, Limit)}


#: None of them changes what the model answers.
_setting = partial(setting, affects_output=False)


class ServingConfig(Config):
    """Address, API key and admission of the server."""

    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 answers other machines too")
    port: int = _setting(8000, "port to listen on; 0 takes a free one", ge=0, le=65535)
    api_key: str | None = _setting(
        None, "key that clients must send as `Authorization: Bearer KEY`; none asks for none", min_length=1
    )
    keys: Path | None = _setting(None, "file of API keys, by `bessemer keys`; read again when it changes")
    hosts: list[str] = _setting(
        default_factory=list,
        description="host names by which clients may address the server, besides localhost and IP addresses; * is any",
    )
    origins: list[str] = _setting(
        default_factory=list, description="origins, such as https://example.org, whose pages may use the server from a browser"
    )
    max_body: float = _setting(float(BODY.most), "size of a request above which it is refused with 413", unit="MiB", gt=0)
    body_seconds: float = _setting(
        float(BODY_WAIT.most), "time for the body of a request, after which it is refused with 408", unit="s", gt=0
    )
    drain_seconds: float = _setting(60.0, "time that running requests have to finish after SIGTERM", unit="s", ge=0)
    request_log: bool = _setting(
        False, "log a line of JSON for every request: key, path, status, times and tokens, without its content"
    )
    adapter_root: Path | None = _setting(None, "folder below which an admin key may load adapters while the server runs")
    other_template: bool = _setting(
        False, "serve a model or an adapter even with a chat template that differs from that of its training"
    )
    accept_weights: bool = _setting(
        False,
        "let a trainer replace the weights and the adapters, and free the KV cache: an admin key, or, without keys, any "
        "program of this machine",
    )
    aliases: list[str] = _setting(default_factory=list, description="other names under which clients may ask for the model")
    indexes: dict[str, Path] = _setting(
        default_factory=dict,
        description="indexes of documents (`bessemer index`) that answers may be drawn from, by the names that clients use",
    )
    uploads: Path | None = _setting(
        None, "folder for clients' files and vector stores; none: a temporary one, which ends with the server"
    )
    max_waiting: int = _setting(
        WAITING.most,
        "completions that wait in the engine, beyond those that it computes at once",
        unit="completions",
        ge=0,
    )
    max_queued: int = _setting(
        QUEUED.most,
        "requests that wait for a place in the engine, and of each further model those that wait for it to be loaded; more are "
        "refused with 503, and with 0 all that find no place",
        unit="requests",
        ge=0,
    )
    queue_seconds: float = _setting(
        float(QUEUE_WAIT.most), "time that a request waits so, after which it is refused with 503", unit="s", gt=0
    )

    @model_validator(mode="after")
    def _knows_who_sends_weights(self) -> Self:
        if self.accept_weights and self.keys is None and self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"accept_weights: anybody who reaches {self.host} could replace the model; ask for keys, or listen on 127.0.0.1"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether a server on this host is reachable from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
