"""The limits of a server: what one request may cost, and how long anything is waited for. All of them stand here.

The cost of a request is known before it is admitted: its bytes, the values in them, texts, token ids, completions. Above a
limit it is refused by a line that names the limit, and nothing is computed. `docs/serving.md` has the table, which a test
holds to this list.
"""

from __future__ import annotations

from typing import NamedTuple


class Limit(NamedTuple):
    """A limit: the most that is taken, and what comes of more. setting: where the owner of a server sets another."""

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

#: A body up to this many bytes is parsed on the event loop: in less time than another thread takes to begin.
PARSED_AT_ONCE = 1 << 14

BODY = Limit(8, "MiB", "a body", "413", "`--max-body`")
BODY_WAIT = Limit(30, "s", "until a body has come", "408", "`ServingConfig.body_seconds`")
BODIES = Limit(512, "MiB", "bodies of all requests under way together, those up to 64 KiB aside", "503 with `Retry-After`")
#: Bytes of a body that are not counted among `BODIES`, so that a flood of large ones keeps no ordinary request away.
UNCOUNTED = 1 << 16
HEAD_WAIT = Limit(10, "s", "until the head of a request has come", "the connection is closed")
WRITE_WAIT = Limit(
    30, "s", "for a client to read 16 KiB of an answer that waits for it", "the connection and its requests are ended"
)
#: Bytes that a client reads in `WRITE_WAIT`, or is let go.
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
EMBEDDED = Limit(2_048, "texts", "texts to embed", "400")
ENCODED = Limit(1_000_000, "characters", "texts of `/tokenize` and `/v1/messages/count_tokens`", "400")
METADATA = Limit(16, "pairs", "`metadata` of a response", "400")
METADATA_KEY = Limit(64, "characters", "a name in `metadata` of a response", "400")
METADATA_VALUE = Limit(512, "characters", "a value in `metadata` of a response", "400")

# -- the server

WAITING = Limit(
    32, "completions", "completions that wait beside those that are computed", "503 with `Retry-After`", "`--max-waiting`"
)
#: A single request leaves one in this many waiting places to others.
OTHERS_SHARE = 4
ASIDE = Limit(2, "requests", "`/tokenize`, `/detokenize` and `count_tokens` that are computed at once", "the next one waits")
STORED = Limit(1_000, "responses", "stored responses", "the oldest of the key with the most bytes is dropped")
STORED_BYTES = Limit(256, "MiB", "stored responses together", "the oldest of the key with the most bytes is dropped")

LIMITS: dict[str, Limit] = {name: value for name, value in list(globals().items()) if isinstance(value, Limit)}
