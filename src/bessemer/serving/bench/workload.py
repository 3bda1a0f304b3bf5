"""What is asked in a load test, and when it arrives."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.serving.bench.config import LoadConfig

#: Common words, of which nearly every vocabulary has one token each with the space before it.
_TEXT = (
    "the of and to in is that for it was on are as with they be at one have this from by hot word but what some we can out "
    "other were all there when up use your how said an each she which do their time if will way about many then them write "
    "would like so these her long make thing see him two has look more day could go come did number sound no most people my "
    "over know water than call first who may down side been now find any new work part take get place made live where after "
    "back little only round man year came show every good me give our under name very through just form sentence great "
    "think say help low line differ turn cause much mean before move right boy old too same tell does set three want air "
    "well also play small end put home read hand port large spell add even land here must big high such follow act why ask "
    "men change went light kind off need house picture try us again animal point mother world near build self earth father"
)


def bodies(config: LoadConfig, model: str) -> Iterator[dict[str, Any]]:
    """Bodies of requests without end; the same for the same settings. Raises SourceError for a file without prompts."""
    common: dict[str, Any] = {
        "model": model,
        "max_tokens": config.output_tokens,
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.top_p is not None:
        common["top_p"] = config.top_p
    if config.ignore_eos:
        common["ignore_eos"] = True
    common |= config.extra_body
    for asked in _asked(config):
        yield {**common, **_as_api(asked, config)}


def _asked(config: LoadConfig) -> Iterator[dict[str, Any]]:
    if config.prompts is not None:
        yield from itertools.cycle(_read(config.prompts))
    generator, common = random.Random(config.seed), _TEXT.split()
    while True:
        # no two begin alike: nothing of a prefix is remembered
        words = [str(generator.randrange(10**6)), *generator.choices(common, k=max(0, config.input_tokens - 1))]
        yield {"prompt": " ".join(words)}


def _as_api(asked: dict[str, Any], config: LoadConfig) -> dict[str, Any]:
    if config.api == "completions":
        if "prompt" not in asked:
            raise SourceError(f"{config.prompts}: conversations are for the API chat")
        return {"prompt": asked["prompt"]}
    return {"messages": asked["messages"] if "messages" in asked else [{"role": "user", "content": asked["prompt"]}]}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict) or not ("prompt" in row or "messages" in row):
            raise SourceError(f"{path}, line {number}: a row has a prompt or messages")
        found.append(row)
    if not found:
        raise SourceError(f"{path}: there is no prompt in it")
    return found


def waits(config: LoadConfig) -> Iterator[float]:
    """Seconds between arrivals: gamma distributed with mean 1/rate. Without a rate none."""
    generator = random.Random(config.seed + 1)
    while True:
        yield 0.0 if config.rate is None else generator.gammavariate(config.burstiness, 1 / (config.rate * config.burstiness))
