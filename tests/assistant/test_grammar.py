"""Grammars of messages: whatever a model writes under one, the parser reads as what was wanted."""

from __future__ import annotations

import json
import re
import time

import jsonschema
import numpy as np
import pytest
import tokenizers

from bessemer.assistant.grammar import MessageForm, OfferedTool, Rules
from bessemer.assistant.parser import ParsedCall
from bessemer.assistant.tool_formats import TOOL_FORMATS
from bessemer.inference.sampling.grammar import GrammarCompiler
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tokenization.folder import TOKENIZER_FILE
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.assistant.scripted import joined
from tests.model.tokenizers import write_small_tokenizer

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


@pytest.fixture(scope="module")
def all_tags(tmp_path_factory):
    """A tokenizer in which the tags of every format are control tokens."""
    folder = write_small_tokenizer(tmp_path_factory.mktemp("tags"))
    tags = sorted({tag for one in FORMATS.values() for tag in one.tags(with_calls=True)} - {"<|channel|>commentary"})
    file = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    file.add_special_tokens([tag for tag in tags if tag.count("|>") < 2])
    file.save(str(folder / TOKENIZER_FILE))
    return load_tokenizer(folder)


@pytest.fixture(params=["tags are text", "tags are control tokens"])
def either_tokenizer(request, tokenizer, all_tags):
    return tokenizer if request.param == "tags are text" else all_tags


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_must_come_fits_its_schema(name, either_tokenizer):
    tool_format = FORMATS[name]
    for seed in range(6):
        text, is_whole = written(tool_format, either_tokenizer, MessageForm(tools=[WEATHER, NOW], must_call=True), seed)
        assert is_whole, text
        calls = read(tool_format, text, WEATHER, NOW)
        assert calls and all(isinstance(call, ParsedCall) for call in calls), text
        for call in calls:
            jsonschema.validate(call.arguments, {"weather": SCHEMA, "now": NOW.parameters}[call.name])


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_at_a_time_where_that_is_asked(name, tokenizer):
    wanted = MessageForm(tools=[WEATHER], must_call=True, in_parallel=False)
    for seed in range(4):
        (call,) = read(FORMATS[name], written(FORMATS[name], tokenizer, wanted, seed)[0], WEATHER)
        assert call.name == "weather"


def fits(tokenizer, tool_format, wanted, text):
    """Whether a model may write a text, and end behind it. Tags are their tokens where they are control tokens."""
    params = SamplingParams(ebnf=tool_format.grammar(wanted, tokenizer.control_id))
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size).matcher(params)
    tags = [tag for tag in tool_format.tags(with_calls=True) if tokenizer.control_id(tag) is not None]
    ids = []
    for piece in re.split("(" + "|".join(map(re.escape, tags)) + ")", text) if tags else [text]:
        control = tokenizer.control_id(piece)
        ids += tokenizer.encode(piece, add_bos=False) if control is None else [control]
    if matcher.valid_prefix(ids) < len(ids):
        return False
    for id in ids:
        matcher.consume(id)
    return matcher.complete


@pytest.mark.parametrize("name", FORMATS)
def test_a_strict_tool_is_called_by_its_schema_or_not_at_all(name, either_tokenizer):
    tool_format, tool = FORMATS[name], WEATHER._replace(is_strict=True)
    (text, _) = written(tool_format, either_tokenizer, MessageForm(tools=[tool], must_call=True, in_parallel=False), 1)
    (call,) = read(tool_format, text, tool)
    # bare JSON of an answer cannot be told from a call: the tag says which it is
    call_text = text if text.startswith(tool_format.opening) else tool_format.opening + text
    said = "<|channel|>final<|message|>It rains." if name == "gpt_oss" else "It rains."
    wanted = MessageForm(tools=[tool])
    assert fits(either_tokenizer, tool_format, wanted, call_text)
    assert fits(either_tokenizer, tool_format, wanted, said)
    assert not fits(either_tokenizer, tool_format, wanted, call_text.replace(call.arguments["city"], "Lima"))
    assert not fits(either_tokenizer, tool_format, wanted, call_text.replace("weather", "whether"))


CLOSING = {"hermes": "</think>\n\n", "gpt_oss": "<|end|><|start|>assistant<|channel|>final<|message|>"}
BEGINNING = {"hermes": "<think>", "gpt_oss": "<|channel|>analysis<|message|>"}
ANSWER = {"hermes": "", "gpt_oss": "<|channel|>final<|message|>"}


@pytest.mark.parametrize("name", ["hermes", "gpt_oss"])
@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (("choice", ["yes", "no"]), "no", "nope"),
        (("regex", r"a/b|\\/|\/c"), "a/b", "ab"),
        (("json_schema", SCHEMA), '{"city": "Rome", "days": 1}', '{"city": "Lima", "days": 1}'),
        (("json_schema", json.dumps(SCHEMA)), '{"city": "Rome", "days": 1}', '{"city": "Rome"}'),
        (("ebnf", 'start: sum\nsum: /[0-9]+/ ("+" /[0-9]+/)*\n'), "1+22", "1+"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_an_answer_of_a_form_stands_behind_the_thinking(name, form, right, wrong, either_tokenizer):
    tool_format, closing = FORMATS[name], CLOSING[name]
    opened = MessageForm(thinking="open", answer=form)
    assert fits(either_tokenizer, tool_format, opened, f"hm, hm{closing}{right}")
    assert not fits(either_tokenizer, tool_format, opened, f"hm, hm{closing}{wrong}")
    assert not fits(either_tokenizer, tool_format, opened, right)
    free = MessageForm(thinking="may", answer=form)
    assert fits(either_tokenizer, tool_format, free, ANSWER[name] + right)
    assert fits(either_tokenizer, tool_format, free, f"{BEGINNING[name]}hm{closing}{right}")
    assert not fits(either_tokenizer, tool_format, free, ANSWER[name] + wrong)


def test_values_in_tags_may_refer_to_the_whole_schema_and_be_anything(tokenizer):
    parameters = {
        "$defs": {"size": {"enum": [1, 2]}},
        "properties": {"size": {"$ref": "#/$defs/size"}, "more": True},
        "required": ["size"],
    }
    wanted = MessageForm(tools=[OfferedTool("cut", parameters)], must_call=True)
    call = "<tool_call>\n<function=cut>\n<parameter=size>\n{}\n</parameter>\n</function>\n</tool_call>"
    assert fits(tokenizer, FORMATS["qwen3_coder"], wanted, call.format(2))
    assert not fits(tokenizer, FORMATS["qwen3_coder"], wanted, call.format(3))


@pytest.mark.parametrize("line", ["\n", " \n", "start", "start\n", "start[\n", "start[]\n", "\tstart \n", "start[a"], ids=ascii)
def test_a_grammar_of_a_client_is_renamed_in_a_time_that_grows_with_its_length(line):
    """A quadratic search takes minutes for these."""
    text = line * (400_000 // len(line))
    started = time.process_time()
    assert Rules(lambda text: None).form(("ebnf", text)) == "whole_answer"
    assert time.process_time() - started < 5


@pytest.mark.parametrize("start", ["start:", "  start :", "\n\n start\n:", 'start[capture, stop="x"] :', "start [capture]:"])
def test_the_start_of_a_client_s_grammar_gets_another_name(start):
    rules = Rules(lambda text: None)
    rules.form(("ebnf", f'restart: "b"\n{start} "a" restart starting\nstarting: "c"'))
    renamed = start.replace("start", "whole_answer")
    assert f'restart: "b"\n{renamed} "a" restart starting\nstarting: "c"' in rules.text("whole_answer")
