"""What hooks say of calls that the caller of the turn runs: asked before a call is given out."""

import dataclasses
import itertools

import pytest

from bessemer.assistant.assistant import Assistant
from bessemer.assistant.conversation import AssistantConfig, Conversation
from bessemer.assistant.hooks import Deny, Hook
from bessemer.assistant.messages import Called, Message, MessageEnd, Returned, TextDelta, ToolCall, TurnEnd
from bessemer.assistant.tools import Tool
from bessemer.inference.sampling.params import SamplingParams
from tests.assistant.scripted import CITY, WEATHER, ScriptedModel, call_text, joined

PARAMS = SamplingParams(max_tokens=400)
OPEN = Tool("open", "Opens the windows in a city.", CITY)


def opened(city):
    return call_text("open", f'{{"city": "{city}"}}')


class Guard(Hook):
    """Denies what is to be done in Linz, and has everything else done in Graz."""

    def __init__(self):
        self.seen = []

    def before_call(self, call, tool, context):
        self.seen.append((call.arguments["city"], context.conversation.messages[-1].role))
        if call.arguments["city"] == "Linz":
            return Deny("not in Linz")
        return dataclasses.replace(call, arguments={"city": "Graz"})


def asked():
    return Conversation([Message.user("Open the windows")])


def test_a_call_that_a_hook_changes_is_changed_wherever_it_is_told(tokenizer):
    conversation, guard = asked(), Guard()
    model = ScriptedModel(tokenizer, f"Yes.\n{opened('Wien')}\nSo.")
    events = joined(Assistant(model, PARAMS, [OPEN]).turn(conversation, hooks=[guard]))
    call = ToolCall("call00001", "open", {"city": "Graz"})
    assert events[:3] == [TextDelta("Yes."), Called(call), TextDelta("So.")]
    assert events[3] == MessageEnd(conversation.messages[-1]) and events[4].reason == "tool_calls"
    assert conversation.messages[-1].calls == (call,)
    assert guard.seen == [("Wien", "assistant")], "once, with its message in the conversation"


def test_a_call_that_a_hook_denies_is_not_given_out_and_the_assistant_is_told(tokenizer):
    conversation = asked()
    model = ScriptedModel(tokenizer, f"{opened('Linz')}\n{opened('Wien')}", "Fine.")
    assistant = Assistant(model, PARAMS, [OPEN])
    events = joined(assistant.turn(conversation, hooks=[Guard()]))
    assert [event.call.id for event in events if isinstance(event, Called)] == ["call00002"]
    assert [(event.call.id, event.result.text) for event in events if isinstance(event, Returned)] == [
        ("call00001", "error: not in Linz")
    ]
    assert events[-1].reason == "tool_calls", "the other waits for the caller"


def test_a_turn_goes_on_behind_a_denied_call_as_far_as_it_may(tokenizer):
    calls = [opened("Linz")] * 5
    for most in (1, 3):
        model, conversation = ScriptedModel(tokenizer, *calls), asked()
        assistant = Assistant(model, PARAMS, [OPEN], AssistantConfig(max_rounds=most))
        events = list(assistant.turn(conversation, hooks=[Guard()]))
        assert sum(isinstance(event, MessageEnd) for event in events) == most and events[-1].reason == "rounds"
        assert not any(isinstance(event, Called) for event in events)
    model = ScriptedModel(tokenizer, opened("Linz"), "I may not.")
    events = joined(Assistant(model, PARAMS, [OPEN]).turn(asked(), hooks=[Guard()]))
    assert [type(event) for event in events] == [MessageEnd, Returned, TextDelta, MessageEnd, TurnEnd]


def test_a_call_of_a_message_that_is_cut_is_decided_about_too(tokenizer):
    text = f"{opened('Linz')}\n{opened('Wien')} and so on"
    tokens = len(tokenizer.encode(text, add_bos=False))
    model, conversation = ScriptedModel(tokenizer, text), asked()
    events = joined(Assistant(model, SamplingParams(max_tokens=tokens - 1), [OPEN]).turn(conversation, hooks=[Guard()]))
    assert [event.call.arguments for event in events if isinstance(event, Called)] == [{"city": "Graz"}]
    assert events[-1].reason == "length"


def test_calls_are_given_out_at_once_where_nobody_asks_and_where_the_turn_runs_them(tokenizer):
    for tools, hooks in (([OPEN], []), ([dataclasses.replace(OPEN, function=WEATHER.function)], [Guard()])):
        events = Assistant(ScriptedModel(tokenizer, f"{opened('Linz')} so", "Fine."), PARAMS, tools).turn(asked(), hooks=hooks)
        kinds = [type(event) for event in events]
        assert kinds.index(Called) < kinds.index(TextDelta)


def test_a_turn_that_is_left_keeps_no_call_that_was_not_given_out(tokenizer):
    text = f"Yes.\n{opened('Wien')}"
    model, conversation = ScriptedModel(tokenizer, f"{text} and so on"), asked()
    turn = Assistant(model, PARAMS, [OPEN]).start(conversation, hooks=[Guard()])
    turn.begin()
    given = []
    for delta in itertools.islice(model.stream(turn.generation), len(tokenizer.encode(text, add_bos=False)) + 2):
        given += turn.take(delta)
    turn.interrupt()
    assert joined(given) == [TextDelta("Yes.")] and conversation.messages[-1].calls == ()


def test_a_hook_that_fails_leaves_the_conversation_as_it_was(tokenizer):
    class Fails(Hook):
        def before_call(self, call, tool, context):
            raise OSError("nobody is there to ask")

    conversation = asked()
    with pytest.raises(OSError, match="nobody"):
        list(Assistant(ScriptedModel(tokenizer, opened("Wien")), PARAMS, [OPEN]).turn(conversation, hooks=[Fails()]))
    assert [message.role for message in conversation.messages] == ["user"] and len(conversation.transcript) == 0
