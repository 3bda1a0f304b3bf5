"""Turns of gpt-oss, whose message is several on channels: what is asked of the model, and what is in the transcript."""

import pytest
import torch

from bessemer.assistant.assistant import Assistant, EngineModel
from bessemer.assistant.conversation import AssistantConfig, Conversation
from bessemer.assistant.hooks import Hook, Refuse
from bessemer.assistant.messages import Called, Message, MessageEnd, TextDelta, ThinkingDelta, TurnEnd
from bessemer.assistant.tools import Tool, ToolChoice
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from tests.assistant.scripted import CITY, OneTextModel, ScriptedModel, joined, spelled
from tests.inference.models import BASE
from tests.model.randomised import random_decoder

ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
AGAIN = "<|end|><|start|>assistant"
ASKED = "<|start|>user<|message|>Who?<|im_end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CALLERS = Tool("weather", "The weather of a city.", CITY)


def answered(model, budget, tools=(), hooks=(), choice=None, **params):
    """The events of a turn, and its conversation."""
    conversation = Conversation([Message.user("Who?")])
    assistant = Assistant(model, SamplingParams(max_tokens=400, **params), tools, AssistantConfig(thinking_budget=budget))
    turn = assistant.start(conversation, hooks=hooks, tool_choice=choice)
    turn.begin()
    events = []
    while turn.end is None:
        if turn.wants_tools:
            events += turn.run_tools()
            continue
        generation = turn.generation
        for delta in model.stream(generation):
            events += turn.take(delta)
            if turn.generation is not generation:
                break
    return joined(events), conversation


def written(conversation, tokenizer):
    return tokenizer.decode(conversation.transcript.ids, skip_special=False)


@pytest.mark.parametrize("ends", ["by its tag", "at the budget", "by an end token"])
def test_an_answer_of_a_form_follows_thinking_that_ends_anyhow(channel_tokenizer, ends):
    budget = 3 if ends == "at the budget" else 40
    thought = {"by its tag": f"hm{AGAIN}{FINAL}free", "at the budget": "h" * 9, "by an end token": "hm"}[ends]
    script = [spelled(channel_tokenizer, text) for text in (thought, f'{FINAL}{{"a": 1}}')]
    model = ScriptedModel(channel_tokenizer, *script)
    events, conversation = answered(model, budget, json_schema=SCHEMA)
    shown = "hhh" if ends == "at the budget" else "hm"
    assert events[:2] == [ThinkingDelta(shown), TextDelta('{"a": 1}')] and events[-1].reason == "answer"
    whole = f'{ASKED}{ANALYSIS}{shown}{AGAIN}{FINAL}{{"a": 1}}<|im_end|>'
    assert written(conversation, channel_tokenizer).endswith(whole)
    assert model.asked[0].params.grammar is None and model.asked[1].params.ebnf is not None


def test_a_call_that_must_come_follows_thinking_within_the_budget(channel_tokenizer):
    script = [spelled(channel_tokenizer, text) for text in ("h" * 9, f'{CALL}{{"city": "Graz"}}')]
    events, conversation = answered(ScriptedModel(channel_tokenizer, *script), 3, [CALLERS], choice=ToolChoice(must_call=True))
    assert [type(event) for event in events] == [ThinkingDelta, Called, MessageEnd, TurnEnd]
    assert written(conversation, channel_tokenizer).endswith(f'{ANALYSIS}hhh{AGAIN}{CALL}{{"city": "Graz"}}<|im_end|>')


def test_without_thinking_an_answer_of_a_form_has_one_header_and_comes_as_it_is_written(channel_tokenizer):
    model = ScriptedModel(channel_tokenizer, spelled(channel_tokenizer, f'{FINAL}{{"a": 1}}'))
    events, conversation = answered(model, 0, json_schema=SCHEMA)
    assert events[0] == TextDelta('{"a": 1}')
    assert written(conversation, channel_tokenizer).endswith(f'{ASKED}{ANALYSIS}{AGAIN}{FINAL}{{"a": 1}}<|im_end|>')


def test_without_thinking_an_answer_comes_as_it_is_written(channel_tokenizer):
    model, conversation = ScriptedModel(channel_tokenizer, "Yes"), Conversation([Message.user("Who?")])
    events = Assistant(model, config=AssistantConfig(thinking_budget=0)).turn(conversation)
    assert next(events) == TextDelta("Y"), "not at the message's end"
    list(events)
    assert written(conversation, channel_tokenizer).endswith(f"{ASKED}{ANALYSIS}{AGAIN}{FINAL}Yes<|im_end|>")


@pytest.mark.parametrize("budget", [0, 3, 16, 24, 40])
def test_no_more_is_thought_than_the_budget_whatever_was_said_before(channel_tokenizer, budget):
    header = "" if budget == 0 else "<|channel|>commentary<|message|>"
    text = f"{header}I will look into it now{AGAIN}{ANALYSIS}{'hm ' * 30}"
    model = OneTextModel(channel_tokenizer, spelled(channel_tokenizer, text))
    events, conversation = answered(model, budget)
    before = len(spelled(channel_tokenizer, text.partition("hm ")[0]))
    thought = len(channel_tokenizer.encode(conversation.messages[-1].thinking, add_bos=False))
    assert thought == max(budget - before, 0), "what comes behind it is the answer"
    assert isinstance(events[0], TextDelta) and events[0].text.startswith("I will look into it now")
    assert written(conversation, channel_tokenizer).count(f"{AGAIN}{FINAL}") == 1 + (budget == 0)


def test_a_stop_token_of_the_callers_ends_the_message_in_its_thinking(channel_tokenizer):
    stop = channel_tokenizer.encode("~", add_bos=False)
    model = ScriptedModel(channel_tokenizer, "hm~hm")
    events, _ = answered(model, 40, json_schema=SCHEMA, stop_token_ids=stop)
    assert [type(event) for event in events] == [ThinkingDelta, MessageEnd, TurnEnd] and len(model.asked) == 1


@pytest.mark.parametrize("budget", [None, 0, 20])
def test_a_refusal_is_on_the_channel_of_answers(channel_tokenizer, budget):
    class Refuses(Hook):
        def check(self, draft, context, *, is_final):
            return Refuse("no", "No.")

    model = OneTextModel(channel_tokenizer, spelled(channel_tokenizer, f"{ANALYSIS}hm{AGAIN}{FINAL}bad"))
    _, conversation = answered(model, budget, hooks=[Refuses()])
    empty = f"{ANALYSIS}{AGAIN}" if budget == 0 else ""
    assert written(conversation, channel_tokenizer).endswith(f"{ASKED}{empty}{FINAL}No.")


def test_an_engine_stops_at_the_tag_and_holds_the_answer_to_its_form(channel_tokenizer):
    thought, answer = spelled(channel_tokenizer, f"hm{AGAIN}"), spelled(channel_tokenizer, f'{FINAL}{{"a": 1}}<|im_end|>')
    last_of_header = thought[-1]

    def force(prompt, written, logits):
        script = answer if prompt[-1] == last_of_header else thought
        forced = torch.full_like(logits, -torch.inf)
        forced[script[len(written)]] = 0
        return forced

    shape = BASE.with_changes(max_position_embeddings=1024, vocab_size=channel_tokenizer.vocab_size)
    model = EngineModel(Engine(random_decoder(shape, 0), channel_tokenizer))
    events, conversation = answered(model, 40, json_schema=SCHEMA, logits_processor=force)
    assert events[:2] == [ThinkingDelta("hm"), TextDelta('{"a": 1}')]
    assert written(conversation, channel_tokenizer).endswith(f'{ANALYSIS}hm{AGAIN}{FINAL}{{"a": 1}}')
