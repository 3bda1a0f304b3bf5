"""Grammars of messages: whatever a model writes under one, the parser reads as what was wanted."""

from __future__ import annotations

import jsonschema
import numpy as np
import pytest

from bessemer.assistant.events import BadCall, TextDelta
from bessemer.assistant.grammar import OfferedTool, Wanted
from bessemer.assistant.json_calls import ParsedCall
from bessemer.assistant.tool_formats import TOOL_FORMATS
from bessemer.inference.sampling.grammar import GrammarCompiler
from bessemer.inference.sampling.params import SamplingParams
from tests.assistant.scripted import joined

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "hourly": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = OfferedTool("weather", SCHEMA)
NOW = OfferedTool("now", {"type": "object", "properties": {}, "additionalProperties": False})
FORMATS = {name: plugin.load() for name, plugin in TOOL_FORMATS.items()}


def written(tool_format, tokenizer, wanted, seed):
    """A text that a model without any knowledge writes under the grammar: every token that is allowed is as likely."""
    generator, params = np.random.default_rng(seed), SamplingParams(ebnf=tool_format.grammar(wanted, tokenizer.control_id))
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size).matcher(params)
    ids = []
    for _ in range(600):
        allowed = np.flatnonzero(matcher.allowed())
        ends = [id for id in allowed if id in tokenizer.eos_ids]
        # a grammar that lets a text end lets it end soon
        token = ends[0] if ends and generator.random() < 0.5 else generator.choice(allowed)
        matcher.consume(int(token))
        if token not in tokenizer.eos_ids:
            ids.append(int(token))
        if matcher.finished:
            break
    shown = tool_format.tags(with_calls=True)
    controls = {tokenizer.control_id(tag): tag for tag in shown if tokenizer.control_id(tag) is not None}
    text, plain = "", []
    for id in [*ids, None]:
        if id is None or id in controls:
            text += tokenizer.decode(plain) if plain else ""
            text, plain = text + controls.get(id, ""), []
        else:
            plain.append(id)
    return text, matcher.complete


def read(tool_format, text, *tools, **options):
    parser = tool_format.parser({tool.name: tool.parameters for tool in tools}, **options)
    return joined([*parser.feed(text), *parser.finish()])


@pytest.fixture(params=["tags are text", "tags are control tokens"])
def either_tokenizer(request, tokenizer, tagged_tokenizer):
    return tokenizer if request.param == "tags are text" else tagged_tokenizer


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_must_come_fits_its_schema(name, either_tokenizer):
    tool_format = FORMATS[name]
    for seed in range(6):
        text, is_whole = written(tool_format, either_tokenizer, Wanted(tools=[WEATHER, NOW], must_call=True), seed)
        assert is_whole, text
        calls = read(tool_format, text, WEATHER, NOW)
        assert calls and all(isinstance(call, ParsedCall) for call in calls), text
        for call in calls:
            jsonschema.validate(call.arguments, {"weather": SCHEMA, "now": NOW.parameters}[call.name])


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_at_a_time_where_that_is_asked(name, tokenizer):
    wanted = Wanted(tools=[WEATHER], must_call=True, in_parallel=False)
    for seed in range(4):
        (call,) = read(FORMATS[name], written(FORMATS[name], tokenizer, wanted, seed)[0], WEATHER)
        assert call.name == "weather"


@pytest.mark.parametrize("name", FORMATS)
def test_a_strict_tool_is_called_by_its_schema_or_not_at_all(name, either_tokenizer):
    tool_format, tool = FORMATS[name], WEATHER._replace(is_strict=True)
    said = 0
    for seed in range(8):
        text, _ = written(tool_format, either_tokenizer, Wanted(tools=[tool]), seed)
        for event in read(tool_format, text, tool):
            assert not isinstance(event, BadCall), text
            if isinstance(event, ParsedCall):
                jsonschema.validate(event.arguments, SCHEMA)
            said += isinstance(event, TextDelta)
    assert said


@pytest.mark.parametrize("name", ["hermes", "gpt_oss"])
@pytest.mark.parametrize("thinking", ["open", "may"])
def test_an_answer_of_a_form_stands_behind_the_thinking(name, thinking, either_tokenizer):
    tool_format = FORMATS[name]
    for form, allowed in ((("choice", ["yes", "no"]), {"yes", "no"}), (("regex", "a/b|c"), {"a/b", "c"})):
        for seed in range(4):
            text, is_whole = written(tool_format, either_tokenizer, Wanted(thinking=thinking, answer=form), seed)
            if not is_whole:
                continue  # it thinks to this day
            said = [
                event.text for event in read(tool_format, text, in_thinking=thinking == "open") if isinstance(event, TextDelta)
            ]
            assert "".join(said).strip() in allowed, text
