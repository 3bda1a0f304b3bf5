"""The parser, however the text is cut."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.assistant.messages import BadCall, TextDelta, ThinkingDelta
from bessemer.assistant.parser import OutputParser
from bessemer.assistant.tool_formats import TOOL_FORMATS, ParsedCall, format_of_template
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from tests.assistant.scripted import joined

FORMATS = {name: plugin.load() for name, plugin in TOOL_FORMATS.items()}
HERMES, LLAMA3, MISTRAL = (FORMATS[name] for name in ("hermes", "llama3", "mistral"))
MISTRAL_NAMED, QWEN3_CODER, GPT_OSS = (FORMATS[name] for name in ("mistral_named", "qwen3_coder", "gpt_oss"))
#: Of the tools that are offered.
SCHEMAS = {
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": ["null", "array"]}},
    }
}
ADD = ParsedCall("add", {"a": 1, "b": "</tool_call> ü"})
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "</tool_call> ü"}}\n</tool_call>'


def parser_of(tool_format, **options):
    return OutputParser(None, **options) if tool_format is None else tool_format.parser(SCHEMAS, **options)


def parsed(tool_format, pieces, **options):
    parser = parser_of(tool_format, **options)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined([*events, *parser.finish()])


CASES = {
    "an answer": (HERMES, " It is < 3 </think> and\n\n", [TextDelta(" It is < 3 </think> and\n\n")]),
    "thinking": (
        HERMES,
        "\n<think>\nhm <tool_call>\n</think>\n\nYes. \n",
        [ThinkingDelta("hm <tool_call>"), TextDelta("Yes. \n")],
    ),
    "no thinking": (HERMES, "<think>\n\n</think>\n\nYes", [TextDelta("Yes")]),
    "thinking is cut": (HERMES, "<think>hm </thi", [ThinkingDelta("hm </thi")]),
    "later tags are text": (HERMES, "a <think> b</think>", [TextDelta("a <think> b</think>")]),
    "calls": (HERMES, f"Let me see.\n{CALL}\n{CALL}\n", [TextDelta("Let me see."), ADD, ADD]),
    "thinking and a call": (HERMES, f"<think>hm</think>\n{CALL}", [ThinkingDelta("hm"), ADD]),
    "text behind a call": (HERMES, f"{CALL}\nSo.", [ADD, TextDelta("So.")]),
    "a call without its end": (HERMES, CALL.removesuffix("call>"), [ADD]),
    "a call that is none": (
        HERMES,
        '<tool_call>{"name": add}</tool_call> so',
        [
            BadCall('<tool_call>{"name": add}</tool_call>', "not JSON (Expecting value at character 9)"),
            TextDelta("so"),
        ],
    ),
    "a call without its tags": (HERMES, ' {"name": "add", "arguments": {"a": 1}}\n', [ParsedCall("add", {"a": 1})]),
    "a call in a block of code": (
        HERMES,
        '<think>hm</think>\n```json\n{\n  "name": "add",\n  "arguments": {\n    "a": 1\n  }\n}\n```',
        [ThinkingDelta("hm"), ParsedCall("add", {"a": 1})],
    ),
    "calls in blocks of code": (
        HERMES,
        '```\n[{"name": "add", "arguments": {"a": 1}}]\n```\n\n```json\n{"name": "add", "arguments": {}}\n```\n',
        [ParsedCall("add", {"a": 1}), ParsedCall("add", {})],
    ),
    "a call without its opening tag": (HERMES, '{"name": "add", "arguments": {}}\n</tool_call>', [ParsedCall("add", {})]),
    "a call that is shown": (
        HERMES,
        '```json\n{"name": "add", "arguments": {}}\n```\nadds.',
        [TextDelta('```json\n{"name": "add", "arguments": {}}\n```\nadds.')],
    ),
    "JSON with the name of no tool": (HERMES, '{"name": "adder"}', [TextDelta('{"name": "adder"}')]),
    "a block of JSON that is cut": (HERMES, '```json\n{"name": "add", "arg', [TextDelta('```json\n{"name": "add", "arg')]),
    "a block of another language": (HERMES, "```python\nadd()\n```", [TextDelta("```python\nadd()\n```")]),
    "a call without tags and one with": (
        HERMES,
        f'{{"name": "add", "arguments": {{}}}} {CALL}',
        [TextDelta('{"name": "add", "arguments": {}}'), ADD],
    ),
    "half an opening tag": (HERMES, "a <tool_cal", [TextDelta("a <tool_cal")]),
    "no tools are offered": (None, f"<think>hm</think> {CALL} \n", [ThinkingDelta("hm"), TextDelta(f"{CALL} \n")]),
    "llama3": (
        LLAMA3,
        'Well. <|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "now", "parameters": {}}',
        [TextDelta("Well."), ParsedCall("add", {"a": 1}), ParsedCall("now", {})],
    ),
    "llama3 without a tag": (LLAMA3, ' {"name": "add", "parameters": {"a": 1}}', [ParsedCall("add", {"a": 1})]),
    "llama3 answers in JSON": (LLAMA3, ' {"sum": 2}\n', [TextDelta(' {"sum": 2}\n')]),
    "llama3 answers in JSON with a name": (LLAMA3, '{"name": "Ann", "age": 5}', [TextDelta('{"name": "Ann", "age": 5}')]),
    "llama3 calls what there is not": (LLAMA3, '<|python_tag|>{"name": "Ann"}', [ParsedCall("Ann", {})]),
    "arguments of no characters": (
        HERMES,
        '<tool_call>{"name": "now", "arguments": ""}</tool_call>',
        [ParsedCall("now", {})],
    ),
    "mistral": (
        MISTRAL,
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": "{}"}]',
        [ParsedCall("add", {"a": 1}), ParsedCall("now", {})],
    ),
    "mistral with names apart": (
        MISTRAL_NAMED,
        'Well.[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]now[ARGS]{}',
        [TextDelta("Well."), ParsedCall("add", {"a": 1}), ParsedCall("now", {})],
    ),
    "qwen3_coder": (
        QWEN3_CODER,
        'So.\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2 " \n\n</parameter>\n'
        "<parameter=c>\n[1, null]\n</parameter>\n<parameter=d>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        [TextDelta("So."), ParsedCall("add", {"a": 1, "b": '2 " \n', "c": [1, None], "d": "3"}), ParsedCall("now", {})],
    ),
    "qwen3_coder without its end": (
        QWEN3_CODER,
        "<tool_call>\n<function=add>\n<parameter=a>\nmany\n</parameter>\n</function>\n",
        [ParsedCall("add", {"a": "many"})],
    ),
    "qwen3_coder and no call": (
        QWEN3_CODER,
        "<tool_call>add</tool_call>",
        [BadCall("<tool_call>add</tool_call>", "must be <function=NAME> with its parameters")],
    ),
    "gpt_oss": (
        GPT_OSS,
        "<|channel|>analysis<|message|>hm < |<|end|><|start|>assistant<|channel|>final<|message|>So it is. \n",
        [ThinkingDelta("hm < |"), TextDelta("So it is. \n")],
    ),
    "gpt_oss calls": (
        GPT_OSS,
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>Let me see.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}",
        [ThinkingDelta("hm"), TextDelta("Let me see."), ParsedCall("add", {"a": 1}), ParsedCall("now", {})],
    ),
    "gpt_oss and no call": (
        GPT_OSS,
        "<|channel|>commentary to=functions.add<|message|>{a}<|call|>",
        [
            BadCall(
                "<|channel|>commentary to=functions.add<|message|>{a}<|call|>",
                "not JSON (Expecting property name enclosed in double quotes at character 1)",
            )
        ],
    ),
    "gpt_oss without channels": (GPT_OSS, "So it is.", [TextDelta("So it is.")]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_text_gives_the_same_however_it_is_cut(name):
    tool_format, text, expected = CASES[name]
    assert parsed(tool_format, [text]) == expected
    assert parsed(tool_format, text) == expected, "a character at a time"
    for place in range(1, len(text)):
        assert parsed(tool_format, [text[:place], text[place:]]) == expected


UNION = {"anyOf": [{"type": "string"}, {"type": "null"}]}


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"type": "string"}, "12345", "12345"),
        ({"type": "string"}, "None", "None"),
        (UNION, "12345", "12345"),
        (UNION, '{"a": 1}', '{"a": 1}'),
        (UNION, "true", "true"),
        (UNION, "null", None),
        (UNION, '"null"', "null"),
        ({"type": ["string", "null"]}, "12345", "12345"),
        ({"type": ["string", "integer"]}, "12345", 12345),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, "2"]}, "1", 1),
        ({"enum": [True, "1"]}, "1", "1"),
        ({"const": "1"}, "1", "1"),
        ({"type": "boolean"}, "True", True),
        ({"type": "integer"}, "3.0", 3.0),
        ({"$ref": "#/$defs/limit"}, "None", None),
        ({"$ref": "#/$defs/limit"}, "7", 7),
        ({"$ref": "#/$defs/itself"}, "7", 7),
        ({"allOf": [UNION, {"minLength": 1}]}, "7", "7"),
        ({"type": "integer"}, "many", "many"),
        ({"type": "integer"}, '"many"', "many"),
        ({}, "7", 7),
        (True, "[1]", [1]),
    ],
)
def test_a_value_in_tags_is_what_its_schema_allows(schema, written, value):
    limit = {"anyOf": [{"$ref": "#/$defs/whole"}, {"type": "null"}]}
    itself = {"allOf": [{"$ref": "#/$defs/itself"}] * 9}
    whole = {"$defs": {"whole": {"type": "integer"}, "limit": limit, "itself": itself}, "properties": {"x": schema}}
    body = f"<function=f>\n<parameter=x>\n{written}\n</parameter>\n</function>"
    ((_, arguments),) = QWEN3_CODER.read(body, {"f": whole})
    assert arguments == {"x": value} and type(arguments["x"]) is type(value)


def said(events, kind):
    return "".join(event.text for event in events if isinstance(event, kind))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_given_out_that_is_taken_back(name):
    tool_format, text, expected = CASES[name]
    parser, events = parser_of(tool_format), []
    for character in text:
        events += parser.feed(character)
        for kind in (ThinkingDelta, TextDelta):
            assert said(expected, kind).startswith(said(events, kind))


@given(
    st.sampled_from([*FORMATS.values(), None]),
    st.lists(
        st.sampled_from(
            [
                *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"),
                *("[ARGS]", "<function=add>", "<parameter=a>", "</parameter>", "</function>"),
                *("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "analysis", " to=functions.f"),
                *('{"name": "f"}', '{"name": "add"}', '"', "\\", "{", "<", " ", "\n", "a"),
            ]
        ),
        max_size=9,
    ),
    st.booleans(),
    st.data(),
)
def test_any_text_gives_the_same_however_it_is_cut(tool_format, words, in_thinking, data):
    text = "".join(words)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    assert parsed(tool_format, pieces, in_thinking=in_thinking) == parsed(tool_format, [text], in_thinking=in_thinking)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    texts | st.integers() | st.booleans() | st.none() | st.sampled_from(["</tool_call>", '"</tool_call>', "\\"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=40)
@given(st.lists(st.tuples(texts.filter(bool), st.dictionaries(texts, values, max_size=3)), min_size=1, max_size=3))
def test_calls_in_our_own_template_are_read_as_they_were_written(tokenizer, calls):
    given_calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Hm.", "tool_calls": given_calls}]
    segments = tokenizer.render_chat(messages, tools=tools)
    text = "".join(segment.text for segment in segments if segment.is_assistant and not segment.is_control)
    assert parsed(HERMES, [text]) == [TextDelta("Hm."), *(ParsedCall(*call) for call in calls)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "empty"),
        ("[]", "empty"),
        ("3", "must be an object"),
        ('{"arguments": {}}', "has no name"),
        ('{"name": "f", "arguments": [1]}', "the arguments must be an object"),
        ('{"name": "f", "arguments": {"a": NaN}}', "NaN is no value of JSON"),
        ("[" * 100_000, "nested too deep|not JSON"),
        ('{"name": "f"} and', "not JSON"),
    ],
)
def test_a_malformed_call_says_what_is_wrong(body, reason):
    (bad,) = parsed(HERMES, [f"<tool_call>{body}</tool_call>"])
    assert isinstance(bad, BadCall) and bad.text == f"<tool_call>{body}</tool_call>"
    with pytest.raises(ValueError, match=reason):
        HERMES.read(body, {})


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        (HERMES, '<tool_call>{"name": "\\ud800x"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"\\udc80": 1}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": [\\"\\\\ud800\\"]}"}</tool_call>'),
        (MISTRAL_NAMED, '[TOOL_CALLS]add[ARGS]{"b": "\\ud800"}'),
        (GPT_OSS, '<|channel|>commentary to=functions.add<|message|>{"b": "\\ud800"}<|call|>'),
        (QWEN3_CODER, '<tool_call><function=add><parameter=c>["\\ud800"]</parameter></function></tool_call>'),
        (QWEN3_CODER, "<tool_call><function=\ud800></function></tool_call>"),
    ],
)
def test_a_call_with_a_lone_surrogate_is_none(tool_format, text):
    (bad,) = parsed(tool_format, [text])
    assert bad == BadCall(text, "has a lone surrogate, which is no character")
    assert parsed(tool_format, text) == [bad]


def test_the_format_is_that_of_the_chat_template():
    assert [format_of_template(CHAT_TEMPLATES[name]) for name in ("chatml", "llama3", "plain")] == [HERMES] * 3
    assert format_of_template("{{ '<|python_tag|>' }}") is LLAMA3 and format_of_template("[TOOL_CALLS]") is MISTRAL
    assert format_of_template("[TOOL_CALLS] [ARGS]") is MISTRAL_NAMED
    assert format_of_template("<tool_call>\n<function=") is QWEN3_CODER
    assert format_of_template("<|start|>assistant<|channel|>final<|message|>") is GPT_OSS
    assert format_of_template(None) is HERMES


def test_closing_tags_in_a_text_of_a_call_are_read_in_a_time_that_grows_with_its_length():
    """To count the quotation marks before each from the beginning would take a minute."""
    parser, started = parser_of(HERMES), time.process_time()
    parser.feed('<tool_call>\n{"name": "add", "arguments": {"b": "' + "</tool_call>" * 40_000)
    (call,) = [*parser.feed('"}}\n</tool_call>'), *parser.finish()]
    assert call.arguments["b"] == "</tool_call>" * 40_000
    assert time.process_time() - started < 5
