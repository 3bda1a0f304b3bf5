"""Turns as they are trained, beside those that are served, with the true templates of other people's models."""

import numpy as np
import pytest

from bessemer.assistant.conversation import Conversation
from bessemer.assistant.generation import MessageDraft, MessageText
from bessemer.assistant.grammar import ThinkingTokens
from bessemer.assistant.messages import as_messages
from bessemer.assistant.tool_formats import format_of
from bessemer.inference.sampling.params import SamplingParams
from bessemer.posttraining.data.encoding import encode_prompt, encode_turns
from tests.posttraining.model_families import FAMILIES, write_family

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_weather",
            "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["place"],
            },
        },
    }
]


def called(id, **arguments):
    return {"id": id, "type": "function", "function": {"name": "find_weather", "arguments": arguments}}


def returned(id, content):
    return {"role": "tool", "content": content, "tool_call_id": id, "name": "find_weather"}


PLAIN = [
    {"role": "user", "content": "How is the weather?"},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "And in Paris?"},
    {"role": "assistant", "content": "\nThe sun shines."},
    {"role": "user", "content": "Are you sure, <b>"},
    {"role": "assistant", "content": "Yes: 20 °C."},
]
THINKING = [
    message | ({"reasoning_content": f"They ask number {number}."} if number in (1, 5) else {})
    for number, message in enumerate(PLAIN)
]
CALLS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is the weather in Paris?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [called("call00000", place="Paris", days=2)],
        "reasoning_content": "I look.",
    },
    returned("call00000", '{"sky": "blue"}'),
    {"role": "assistant", "content": "The sky is blue.", "reasoning_content": "It is blue."},
    {"role": "user", "content": "And in Köln?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [called("call00001", place='Köln "am" Rhein')]},
    returned("call00001", "rain"),
    {"role": "assistant", "content": "It rains."},
]
SEVERAL = [
    *CALLS[:2],
    {"role": "assistant", "content": "", "tool_calls": [called("call00000", place="Paris"), called("call00001", place="Rome")]},
    returned("call00000", "sun"),
    returned("call00001", "rain"),
    {"role": "assistant", "content": "Sun there, rain here."},
]
CONVERSATIONS = {"plain": PLAIN, "thinking": THINKING, "calls": CALLS, "several calls": SEVERAL}
#: Formats of one call a turn.
ONE_CALL = ("llama3_1", "gpt_oss")


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = write_family(name, tmp_path_factory.mktemp("families") / name)
        return made[name]

    return get


def cases():
    return [
        pytest.param(name, what, id=f"{name}-{what}")
        for name, family in FAMILIES.items()
        for what in CONVERSATIONS
        if (family.has_tools or "calls" not in what) and not (what == "several calls" and name in ONE_CALL)
    ]


def served(tokenizer, messages, tools):
    """The prompt that a server makes of the messages of a request."""
    conversation = Conversation(as_messages(messages))
    conversation.offer(tools)
    conversation.encode(tokenizer)
    return conversation.transcript.ids


def turns_of(examples):
    """(ids before, learnt ids) of each turn."""
    found = []
    for example in examples:
        begins = np.flatnonzero(np.diff(example.is_learnt, prepend=False) & example.is_learnt)
        ends = np.flatnonzero(np.diff(example.is_learnt, append=False) & example.is_learnt) + 1
        found += [
            (example.ids[:begin].tolist(), example.ids[begin:end].tolist()) for begin, end in zip(begins, ends, strict=True)
        ]
    return found


@pytest.mark.parametrize(("name", "what"), cases())
def test_a_turn_is_trained_behind_the_tokens_that_are_served_and_is_parsed_as_it_was(families, name, what):
    tokenizer, messages = families(name), CONVERSATIONS[what]
    tools = TOOLS if "calls" in what else []
    turns = turns_of(encode_turns((), messages, tokenizer, tools))
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(turns) == len(places)
    for place, (context, learnt) in zip(places, turns, strict=True):
        assert context == served(tokenizer, messages[:place], tools) == encode_prompt(messages[:place], tokenizer, tools)
        assert learnt[-1] in tokenizer.eos_ids
        (wanted,) = as_messages([messages[place]])
        assert parsed(tokenizer, context, learnt, tools) == (wanted.thinking, wanted.text.strip(), calls_in(wanted))


def calls_in(message):
    return [(call.name, dict(call.arguments)) for call in message.calls]


def parsed(tokenizer, context, learnt, tools):
    """What a server makes of the sampled tokens."""
    form = format_of(tokenizer)
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools} or None
    parser = form.parser(schemas, in_thinking=ThinkingTokens(tokenizer, form.thinking).is_open(context))
    numbers = iter("123456789")
    text = MessageText(tokenizer, SamplingParams(), form.tags(with_calls=bool(tools)))
    draft = MessageDraft(parser, text, lambda: next(numbers))
    draft._add(parser.feed(text.feed(learnt, "stop")))
    draft.finish()
    message = draft.message(is_derived=False)
    return message.thinking, message.text.strip(), calls_in(message)
