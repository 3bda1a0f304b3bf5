"""Turns as they are trained, beside those that are served, with the true templates of other people's models."""

import json
import shutil
from itertools import product

import numpy as np
import pytest

from bessemer.assistant.conversation import Conversation
from bessemer.assistant.generation import MessageDraft, MessageText
from bessemer.assistant.grammar import ThinkingTokens
from bessemer.assistant.messages import as_messages
from bessemer.assistant.tool_formats import format_of
from bessemer.core.errors import SourceError
from bessemer.inference.sampling.params import SamplingParams
from bessemer.posttraining.data.encoding import NothingLearntError, RowError, encode_answer, encode_prompt, encode_turns
from bessemer.posttraining.data.examples import Conversation as Row
from bessemer.posttraining.data.packing import fit_conversations
from bessemer.tokenization.tokenizer import load_tokenizer
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


def without_ids(messages):
    given = json.loads(json.dumps(messages))
    for message in given:
        message.pop("tool_call_id", None)
        for call in message.get("tool_calls", ()):
            del call["id"]
    return given


def with_arguments_in_text(messages):
    given = json.loads(json.dumps(messages))
    for call in (call for message in given for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], indent=1)
    return given


def with_thinking_in_the_text(messages):
    return [
        {"role": "assistant", "content": f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"}
        if message.get("reasoning_content")
        else message
        for message in messages
    ]


def same(examples, others):
    return [(one.ids.tolist(), one.is_learnt.tolist()) for one in examples] == [
        (one.ids.tolist(), one.is_learnt.tolist()) for one in others
    ]


@pytest.mark.parametrize("name", ["qwen3", "mistral_nemo", "deepseek_v31"])
def test_rows_of_other_spellings_are_trained_as_they_are_served(families, name):
    tokenizer = families(name)
    usual = encode_turns((), CALLS, tokenizer, TOOLS)
    assert same(encode_turns((), without_ids(CALLS), tokenizer, TOOLS), usual)
    assert same(encode_turns((), with_arguments_in_text(CALLS), tokenizer, TOOLS), usual)
    assert same(encode_turns((), with_thinking_in_the_text(THINKING), tokenizer), encode_turns((), THINKING, tokenizer))


def test_a_template_that_only_appends_gives_one_example_and_qwen3_one_a_turn(families):
    assert [len(encode_turns((), PLAIN[:3] + PLAIN[5:], families(name))) for name in ("llama3_1", "gemma2", "qwen3")] == [
        1,
        1,
        2,
    ]
    # thinking that a template drops later is learnt where it was served
    (first, *_), thought = encode_turns((), THINKING, families("qwen3")), "They ask number 1."
    assert thought in families("qwen3").decode(first.ids[first.is_learnt].tolist())


def test_ids_that_a_template_refuses_are_given_as_turns_give_them(families):
    tokenizer = families("mistral_nemo")
    long = json.loads(json.dumps(CALLS).replace("call00000", "call_a1b2c3").replace("call00001", "call_d4e5f6"))
    assert same(encode_turns((), long, tokenizer, TOOLS), encode_turns((), CALLS, tokenizer, TOOLS))


@pytest.mark.parametrize("name", ONE_CALL)
def test_calls_at_once_come_one_after_the_other_where_a_turn_has_one(families, name):
    tokenizer = families(name)
    first, second = SEVERAL[2]["tool_calls"]
    apart = [
        *SEVERAL[:2],
        SEVERAL[2] | {"tool_calls": [first]},
        SEVERAL[3],
        SEVERAL[2] | {"tool_calls": [second]},
        *SEVERAL[4:],
    ]
    assert same(encode_turns((), SEVERAL, tokenizer, TOOLS), encode_turns((), apart, tokenizer, TOOLS))


def test_an_answer_of_several_turns_is_one_example_that_goes_on_in_tokens(families):
    """As in a server that runs the tools itself, and keeps what was sampled."""
    tokenizer = families("qwen3")
    encoded = encode_answer(CALLS[:2], CALLS[2:5], tokenizer, TOOLS)
    call, answer = turns_of([encoded])
    conversation = Conversation(as_messages(CALLS[:2]))
    conversation.offer(TOOLS)
    conversation.encode(tokenizer)
    assert call[0] == conversation.transcript.ids
    conversation.transcript.append_own(call[1], None)
    conversation.add_answer(*as_messages(CALLS[2:3]))
    conversation.add(*as_messages(CALLS[3:4]))
    conversation.encode(tokenizer)
    assert answer[0] == conversation.transcript.ids


def test_weightless_turns_and_those_of_the_prompt_are_context(families):
    for name in ("qwen3", "llama3_1"):
        tokenizer = families(name)
        marked = [message | ({"weight": 0} if place == 1 else {}) for place, message in enumerate(PLAIN)]
        turns = turns_of(encode_turns(marked[:4], marked[4:], tokenizer))
        assert [learnt for _, learnt in turns] == [turns_of(encode_turns((), PLAIN, tokenizer))[2][1]]
        assert len(turns_of(encode_turns((), marked, tokenizer))) == 2
        with pytest.raises(NothingLearntError, match="all that the assistant says has weight 0"):
            encode_turns(PLAIN[:1], [marked[1]], tokenizer)


def test_a_template_without_a_place_for_tools_learns_calls_as_they_are_served(families):
    tokenizer = families("gemma2")
    *_, (context, learnt) = turns_of(encode_turns((), CALLS[1:], tokenizer, TOOLS))
    text = tokenizer.decode(context)
    assert "<tool_response>" in text and "find_weather" in text and learnt
    calls = [
        turn for turn in turns_of(encode_turns((), CALLS[1:], tokenizer, TOOLS)) if "<tool_call>" in tokenizer.decode(turn[1])
    ]
    assert len(calls) == sum(bool(message.get("tool_calls")) for message in CALLS)


def test_rows_that_a_template_cannot_write_are_counted_with_their_places_and_many_end_the_run(families):
    tokenizer = families("gemma2")
    rows = [Row.of(PLAIN, "a.jsonl")] * 60
    twice = [
        {"role": "user", "content": "One."},
        {"role": "user", "content": "Two."},
        {"role": "assistant", "content": "Three."},
    ]
    bad = [Row(Row.of(twice, "a.jsonl").answered, "a.jsonl", f"a.jsonl:{line}") for line in (7, 9)]
    examples, counts = fit_conversations([*rows, *bad], tokenizer, 500)
    assert len(examples) >= 60 and counts.left_out == 2
    (sentence,) = counts.sentences("62 conversations")
    assert sentence.startswith("  2 of 62 conversations are left out: a.jsonl:7: ") and "roles must alternate" in sentence
    assert sentence.endswith("1 more (a.jsonl:9)")
    with pytest.raises(
        SourceError, match=r"4 of 64 conversations cannot be written by the model.s chat template: a\.jsonl:7: .*alternate"
    ):
        fit_conversations([*rows, *bad, *bad], tokenizer, 500)


def test_an_empty_mask_ends_the_run_with_one_line(families, tmp_path):
    folder = shutil.copytree(families("qwen2_5").folder, tmp_path / "marked")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    with pytest.raises(SourceError, match="nothing would be learnt of any of the 2 conversations: the mask"):
        fit_conversations([Row.of(PLAIN, "a.jsonl")] * 2, load_tokenizer(folder), 500)


@pytest.mark.peer(name="trl")
@pytest.mark.parametrize("name", FAMILIES)
def test_no_row_is_refused_that_trl_trains_on(families, name):
    utils = pytest.importorskip("trl.chat_template_utils")
    from transformers import AutoTokenizer

    ours, peer = families(name), AutoTokenizer.from_pretrained(families(name).folder)
    templates = [None]
    try:
        templates.append(utils.get_training_chat_template(peer))
    except ValueError:
        # TRL learns whole conversations of a template that it has no training form of
        pass
    others = {
        "no ids": without_ids(CALLS),
        "arguments in text": with_arguments_in_text(CALLS),
        "two of the assistant's": [*PLAIN[:2], PLAIN[1]],
        "ends with the user": PLAIN[:5],
        "begins with the assistant": PLAIN[1:],
        "system later": [*PLAIN[:2], CALLS[0], *PLAIN[2:4]],
    }
    for (what, messages), template in product({**CONVERSATIONS, **others}.items(), templates):
        tools = TOOLS if any(message.get("tool_calls") for message in messages) else None
        try:
            peer.apply_chat_template(messages, tools=tools, chat_template=template, return_dict=True)
        except Exception:
            continue
        try:
            assert any(example.is_learnt.any() for example in encode_turns((), messages, ours, tools or ())), what
        except RowError as error:
            pytest.fail(f"{what}: {error}")
