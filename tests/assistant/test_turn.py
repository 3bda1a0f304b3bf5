"""Turns with a scripted model: what is said, what is in the transcript, and what hooks make of it."""

import json
import re

import pytest

from bessemer.assistant.assistant import ApiModel, Assistant
from bessemer.assistant.conversation import AssistantConfig, Conversation, Principal
from bessemer.assistant.grammar import ThinkingTokens
from bessemer.assistant.hooks import Deny, Hook, Pass, Refuse, Retry, Wait
from bessemer.assistant.messages import (
    BadCall,
    Called,
    Message,
    MessageEnd,
    MessagePart,
    Returned,
    RolledBack,
    TextDelta,
    ThinkingDelta,
    ToolCall,
    TurnEnd,
    as_messages,
)
from bessemer.assistant.tools import Tool, ToolResult
from bessemer.core.chat_client import ChatClient
from bessemer.core.errors import ConfigError, RequestError
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tokenization.bpe import byte_level_bpe
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.assistant.scripted import CITY, WEATHER, ScriptedModel, call_text, joined
from tests.chat_server import serving

GRAZ = call_text("weather", '{"city": "Graz"}')
PARAMS = SamplingParams(max_tokens=400)


def asked(text="How warm is it in Graz?"):
    return Conversation([Message.user(text)])


def kinds(events):
    return [type(event) for event in events]


def said(events):
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def own_text(conversation, tokenizer, is_own=True):
    transcript = conversation.transcript
    ids = [id for id, own in zip(transcript.ids, transcript.is_own, strict=True) if own is is_own]
    return tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize("ends", ["by its tag", "at the budget", "by an end token"])
def test_an_answer_of_a_form_is_generated_apart_from_the_thinking_before_it(thinking_tokenizer, ends):
    tokenizer = thinking_tokenizer
    thought = {"by its tag": "hm</think>", "at the budget": "h" * 9, "by an end token": "hm"}[ends]
    budget = 3 if ends == "at the budget" else 40
    model, conversation = ScriptedModel(tokenizer, thought, "yes"), asked()
    params = SamplingParams(max_tokens=400, choice=["yes", "no"])
    events = joined(Assistant(model, params, config=AssistantConfig(thinking_budget=budget)).turn(conversation))
    shown = "hhh" if ends == "at the budget" else "hm"
    assert events[:2] == [ThinkingDelta(shown), TextDelta("yes")] and events[-1].reason == "answer"
    thinking, answer = (generation.params for generation in model.asked)
    assert thinking.grammar is None and thinking.stop == ["</think>"] and thinking.max_tokens == budget
    assert answer.choice == ["yes", "no"] and not answer.stop
    # the tag and the empty line stand once, whoever wrote them
    assert tokenizer.decode(conversation.transcript.ids, skip_special=False).endswith(f"{shown}</think>\n\nyes<|im_end|>")


def test_a_stop_string_in_thinking_that_is_generated_apart_ends_the_message(thinking_tokenizer):
    model = ScriptedModel(thinking_tokenizer, "hm STOP more", "yes")
    params = SamplingParams(max_tokens=400, choice=["yes", "no"], stop=["STOP"])
    events = joined(Assistant(model, params, config=AssistantConfig(thinking_budget=40)).turn(asked()))
    assert kinds(events) == [ThinkingDelta, MessageEnd, TurnEnd] and len(model.asked) == 1
    assert events[-1].reason == "answer" and events[-1].stopped_by == "STOP"


def test_a_stop_string_ends_no_message_in_its_first_min_tokens(tokenizer):
    model, conversation = ScriptedModel(tokenizer, "one two one two"), asked()
    params = SamplingParams(max_tokens=400, stop=["two"], min_tokens=len(tokenizer.encode("one two", add_bos=False)))
    events = joined(Assistant(model, params).turn(conversation))
    assert said(events) == "one two one " and events[-1].stopped_by == "two"


def test_the_tag_that_ends_thinking_is_looked_for_before_min_tokens(thinking_tokenizer):
    model = ScriptedModel(thinking_tokenizer, "hm</think>", "yes")
    params = SamplingParams(max_tokens=400, min_tokens=30, choice=["yes", "no"], stop=["STOP"])
    joined(Assistant(model, params, config=AssistantConfig(thinking_budget=40)).turn(asked()))
    thinking, answer = (generation.params for generation in model.asked)
    assert (thinking.min_tokens, thinking.stop) == (0, ["</think>"])
    assert 0 < answer.min_tokens < 30 and answer.stop == ["STOP"]


def test_without_a_budget_the_form_stands_behind_the_thinking_in_one_grammar(thinking_tokenizer):
    model = ScriptedModel(thinking_tokenizer, "hm</think>\n\nyes")
    events = joined(Assistant(model, SamplingParams(max_tokens=400, choice=["yes", "no"])).turn(asked()))
    assert events[:2] == [ThinkingDelta("hm"), TextDelta("yes")]
    assert model.asked[0].params.choice is None and '"yes" | "no"' in model.asked[0].params.ebnf


# --- a conversation with a tool ---


def test_two_turns_with_a_tool_are_one_growing_sequence_of_tokens(tokenizer):
    model = ScriptedModel(tokenizer, f"Let me look.\n{GRAZ}", "It is 21 degrees.", "You are welcome.")
    assistant, conversation = Assistant(model, PARAMS, [WEATHER]), asked()
    call, result = ToolCall("call00001", "weather", {"city": "Graz"}), ToolResult('{"city": "Graz", "degrees": 21}')
    events = joined(assistant.turn(conversation))
    assert kinds(events) == [TextDelta, Called, MessageEnd, Returned, TextDelta, MessageEnd, TurnEnd]
    assert events[0] == TextDelta("Let me look.") and events[1] == Called(call) and events[3] == Returned(call, result)
    assert events[4] == TextDelta("It is 21 degrees.") and events[-1].reason == "answer"
    first_turn = list(conversation.transcript.ids)
    conversation.add(Message.user("Thanks"))
    assert said(assistant.turn(conversation)) == "You are welcome."

    # append only, and what the template would have written of the whole conversation
    prompts = [generation.token_ids for generation in model.asked]
    tools = [WEATHER.description_in_chat]
    inputs = [message.as_template_input() for message in conversation.messages]
    for prompt, messages, before in zip(prompts, (1, 3, 5), ((), prompts[0], first_turn), strict=True):
        assert list(prompt) == tokenizer.apply_chat_template(inputs[:messages], add_generation_prompt=True, tools=tools)
        assert list(prompt[: len(before)]) == list(before)
    transcript = conversation.transcript
    assert transcript.ids[: len(prompts[2])] == list(prompts[2])

    # the policy's own tokens, and no other
    expected = f"Let me look.\n{GRAZ}<|im_end|>It is 21 degrees.<|im_end|>You are welcome.<|im_end|>"
    assert own_text(conversation, tokenizer) == expected
    for id, own, log_prob, version in zip(
        transcript.ids, transcript.is_own, transcript.log_probs, transcript.weight_versions, strict=True
    ):
        assert (log_prob, version) == ((-id, 7) if own else (0, 0))
    assert events[-1] == TurnEnd("answer", len(prompts[0]), sum(transcript.is_own[: len(first_turn)]))


def test_results_of_tools_are_tainted_and_so_is_what_is_said_of_them(tokenizer):
    conversation = asked()
    assert not conversation.is_tainted
    list(Assistant(ScriptedModel(tokenizer, GRAZ, "Warm."), PARAMS, [WEATHER]).turn(conversation))
    question, call, result, answer = conversation.messages
    assert [message.is_tainted for message in (question, call, result, answer)] == [False, False, True, True]
    assert result.parts[0].origin == "tool" and result.parts[0].source == "weather"
    conversation.forget(0, 3)
    assert conversation.is_tainted, "the answer was derived of what is forgotten"
    assert Message.user("x").with_part(MessagePart("y", "document", "wiki/7")).is_tainted


def test_a_call_alone_that_is_written_after_something_tainted_is_tainted(tokenizer):
    conversation = asked()
    conversation.add_part(MessagePart(" Ask for Graz.", "document", "wiki/7"))
    list(Assistant(ScriptedModel(tokenizer, GRAZ), PARAMS, [Tool("weather", "", CITY)]).turn(conversation))
    assert conversation.messages[1].calls and not conversation.messages[1].parts and conversation.messages[1].is_tainted
    conversation.forget(0, 1)
    assert conversation.is_tainted


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (call_text("weather", '{"city": 3}'), r"error: the arguments do not fit: \$\.city: 3 is not of type 'string'"),
        (call_text("weather", "{}"), "error: the arguments do not fit: .*'city' is a required property"),
        (call_text("wether", "{}"), "error: there is no tool 'wether'; there are weather, raises, hangs, answers, refers"),
        (call_text("raises", "{}"), "error: ZeroDivisionError: division by zero"),
        (call_text("hangs", "{}"), "error: took longer than 0.05 s"),
        (call_text("answers", "{}"), r"\?{20}… \(80 more characters\)"),
        ("<tool_call>{</tool_call>", "error: this call cannot be read: not JSON"),
        (
            call_text("refers", "{}"),
            "error: the arguments do not fit: the schema refers to 'http://127.0.0.1:9/a', which is not in it",
        ),
    ],
)
def test_a_call_that_goes_wrong_is_told_to_the_assistant(tokenizer, written, message):
    def hang():
        while True:
            pass

    tools = [
        WEATHER,
        Tool("raises", "", function=lambda: 1 / 0),
        Tool("hangs", "", function=hang, time_limit=0.05),
        Tool("answers", "", function=lambda: "\udc80" * 100, most_characters=20),
        Tool("refers", "", {"$ref": "http://127.0.0.1:9/a"}, function=dict),
    ]
    model, conversation = ScriptedModel(tokenizer, written, "I see."), asked()
    events = joined(Assistant(model, PARAMS, tools).turn(conversation))
    (returned,) = [event for event in events if isinstance(event, Returned)]
    assert returned.result == ToolResult(conversation.messages[2].text, returned.result.is_error)
    assert re.match(message, returned.result.text)
    assert said(events) == "I see." and events[-1].reason == "answer"
    assert any(isinstance(event, BadCall) for event in events) == written.startswith("<tool_call>{<")


def test_a_tool_of_the_callers_ends_the_turn_and_its_result_begins_the_next(tokenizer):
    model = ScriptedModel(tokenizer, f"{call_text('open', '{}')}\n{GRAZ}", "It is open.")
    assistant, conversation = Assistant(model, PARAMS, [WEATHER, Tool("open", "Opens the window.")]), asked()
    events = joined(assistant.turn(conversation))
    assert events[-1].reason == "tool_calls" and [event.call.name for event in events if isinstance(event, Returned)] == [
        "weather"
    ]
    conversation.add(Message.tool("call00001", "open", "done"))
    assert said(assistant.turn(conversation)) == "It is open."
    assert [message.role for message in conversation.messages] == ["user", "assistant", "tool", "tool", "assistant"]


@pytest.mark.parametrize(("name", "arguments"), [("\\ud800x", "{}"), ("weather", '{"city": "\\ud800"}')])
def test_a_call_with_a_lone_surrogate_is_none_and_the_conversation_goes_on(tokenizer, name, arguments):
    model, conversation = ScriptedModel(tokenizer, call_text(name, arguments), "I see.", "Yes."), asked()
    assistant = Assistant(model, PARAMS, [WEATHER])
    assert kinds(joined(assistant.turn(conversation)))[0] is BadCall
    conversation.add(Message.user("And now?"))
    assert said(assistant.turn(conversation)) == "Yes."
    rendered = Conversation([*conversation.messages, Message.user("Again")])
    rendered.offer([WEATHER.description_in_chat])
    rendered.encode(tokenizer)


def test_tools_are_offered_to_those_who_may_call_them(tokenizer):
    tool = Tool("weather", "", CITY, lambda city: "21", groups=frozenset({"staff"}))
    model = ScriptedModel(tokenizer, GRAZ, "21", GRAZ)
    assistant = Assistant(model, PARAMS, [tool])
    staff = joined(assistant.turn(asked(), Principal("ann", frozenset({"staff"}))))
    others = joined(assistant.turn(asked(), Principal("bob", frozenset({"guests"}))))
    assert kinds(staff) == [Called, MessageEnd, Returned, TextDelta, MessageEnd, TurnEnd]
    assert said(others) == GRAZ, "without tools it is text"
    assert "weather" not in tokenizer.decode(model.asked[2].token_ids)


def test_a_turn_ends_at_its_last_round_and_at_the_end_of_the_context(tokenizer):
    config = AssistantConfig(max_rounds=2)
    conversation = asked()
    events = list(Assistant(ScriptedModel(tokenizer, GRAZ, GRAZ), PARAMS, [WEATHER], config).turn(conversation))
    assert events[-1].reason == "rounds" and [message.role for message in conversation.messages][-1] == "assistant"
    tool = Tool("weather", "", CITY, lambda city: "y" * 300)
    inputs = [message.as_template_input() for message in asked().messages]
    prompt = tokenizer.apply_chat_template(inputs, add_generation_prompt=True, tools=[tool.description_in_chat])
    model, conversation = ScriptedModel(tokenizer, GRAZ, context_length=len(prompt) + 200), asked()
    events = list(Assistant(model, PARAMS, [tool]).turn(conversation))
    assert events[-1].reason == "length" and len(conversation.transcript) < model.context_length
    events = list(Assistant(ScriptedModel(tokenizer, GRAZ), SamplingParams(max_tokens=30), [WEATHER]).turn(asked()))
    assert kinds(events) == [BadCall, MessageEnd, TurnEnd] and events[-1].reason == "length"


def test_an_answer_that_is_cut_is_ended_before_the_next_question(tokenizer):
    model, conversation = ScriptedModel(tokenizer, "It is a long story", "Yes."), asked("Tell me")
    assistant = Assistant(model, SamplingParams(max_tokens=7))
    list(assistant.turn(conversation))
    conversation.add(Message.user("And?"))
    list(assistant.turn(conversation))
    inputs = [message.as_template_input() for message in conversation.messages[:3]]
    assert list(model.asked[1].token_ids) == tokenizer.apply_chat_template(inputs, add_generation_prompt=True)
    assert own_text(conversation, tokenizer).count("<|im_end|>") == 1, "the other is none of the policy's"


# --- thinking ---


def test_at_the_budget_thinking_is_closed_and_the_answer_is_generated(tokenizer):
    thoughts = "<think>\n" + "hm " * 50
    model, conversation = ScriptedModel(tokenizer, thoughts, "42"), asked("6 * 7?")
    assistant = Assistant(model, PARAMS, config=AssistantConfig(thinking_budget=30))
    events = joined(assistant.turn(conversation))
    cut = tokenizer.decode(tokenizer.encode(thoughts, add_bos=False)[:30])
    assert events[:2] == [ThinkingDelta(cut.removeprefix("<think>\n").rstrip()), TextDelta("42")]
    assert [generation.params.max_tokens for generation in model.asked] == [30, 370]
    assert own_text(conversation, tokenizer) == f"{cut}42<|im_end|>"
    assert own_text(conversation, tokenizer, is_own=False).endswith("assistant\n</think>\n\n")
    assert conversation.messages[1].thinking == events[0].text


def test_the_tag_that_is_put_in_has_the_tokens_of_one_that_the_model_learnt(tmp_path, tagged_tokenizer):
    vocabulary = [bytes([byte]) for byte in range(256)] + [b">\n", b">\n\n"]
    write_folder(tmp_path, byte_level_bpe(vocabulary, split="qwen2"))
    tokenizer = load_tokenizer(tmp_path)
    written = tokenizer.encode("<think>hm</think>\n\n42", add_bos=False)
    closing = ThinkingTokens(tokenizer).closing
    assert written[-2 - len(closing) : -2] == closing and tokenizer.decode(closing[-1:]) == ">\n\n"
    assert ThinkingTokens(tagged_tokenizer).closing[0] == tagged_tokenizer.control_id("</think>")


def test_an_answer_goes_on_beyond_the_budget(tokenizer):
    model, conversation = ScriptedModel(tokenizer, "<think>hm</think>\n\nIt is fo", "rty-two."), asked("6 * 7?")
    budget = len(tokenizer.encode(model.texts[0], add_bos=False))
    events = joined(Assistant(model, PARAMS, config=AssistantConfig(thinking_budget=budget)).turn(conversation))
    assert events[:2] == [ThinkingDelta("hm"), TextDelta("It is forty-two.")]
    assert own_text(conversation, tokenizer) == "<think>hm</think>\n\nIt is forty-two.<|im_end|>"


def test_a_budget_within_the_opening_tag_closes_it_when_it_is_there(tokenizer):
    tag = tokenizer.encode("<think>", add_bos=False)
    rest = [tokenizer.decode(tag[place:]) for place in range(3, len(tag))]
    model, conversation = ScriptedModel(tokenizer, "<think>", *rest, "42"), asked("6 * 7?")
    events = joined(Assistant(model, PARAMS, config=AssistantConfig(thinking_budget=3)).turn(conversation))
    assert events[0] == TextDelta("42")
    assert own_text(conversation, tokenizer) == "<think>42<|im_end|>"


def test_thinking_that_the_prompt_opens_is_thinking_and_a_budget_of_0_leaves_none(thinking_tokenizer):
    model = ScriptedModel(thinking_tokenizer, "hm</think>\n\n42", "43")
    events = joined(Assistant(model, PARAMS).turn(asked("6 * 7?")))
    assert events[:2] == [ThinkingDelta("hm"), TextDelta("42")]
    events = joined(Assistant(model, PARAMS, config=AssistantConfig(thinking_budget=0)).turn(asked("6 * 7?")))
    assert events[0] == TextDelta("43")
    assert thinking_tokenizer.decode(model.asked[1].token_ids).endswith("<think>\n</think>\n\n")


def test_tags_that_are_control_tokens_are_read_and_others_are_not_shown(tagged_tokenizer):
    opening, closing, call, called, other = (
        tagged_tokenizer.control_id(token) for token in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|other|>")
    )

    def ids(text):
        return tagged_tokenizer.encode(text, add_bos=False)

    body = ids('{"name": "weather", "arguments": {"city": "Graz"}}')
    script = [[opening, *ids("hm"), closing, call, *body, called], [opening, *ids("ho" * 60)], [other, *ids("Warm.")]]
    model, conversation = ScriptedModel(tagged_tokenizer, *script), asked()
    events = joined(Assistant(model, PARAMS, [WEATHER], AssistantConfig(thinking_budget=64)).turn(conversation))
    assert kinds(events) == [ThinkingDelta, Called, MessageEnd, Returned, ThinkingDelta, TextDelta, MessageEnd, TurnEnd]
    assert said(events) == "Warm."
    assert model.asked[-1].token_ids[-len(ids("\n\n")) - 1 :] == (closing, *ids("\n\n"))


# --- hooks ---


class Censor(Hook):
    """Lets sentences through, and sends back those with a word."""

    holds_back = True

    def __init__(self, word="bad", decision=None):
        self.word, self.decision, self.seen = word, decision or Retry("a bad word", "Be kind."), []

    def check(self, draft, context, *, is_final):
        self.seen.append((draft.text, context.attempt))
        if self.word in draft.text:
            return self.decision
        return Pass() if is_final or draft.text.endswith(".") else Wait()


def test_text_is_held_back_until_it_has_passed_and_a_bad_attempt_leaves_no_trace(tokenizer):
    model, conversation, hook = ScriptedModel(tokenizer, "You bad", "You are right. Yes"), asked("Am I?"), Censor()
    events = list(Assistant(model, PARAMS).turn(conversation, hooks=[hook]))
    shown = [event for event in events if isinstance(event, TextDelta | RolledBack)]
    assert joined(shown) == [TextDelta("You are right. Yes")], "nothing of the first attempt was given out"
    assert hook.seen[-1] == ("You are right. Yes", 1) and ("You bad", 0) in hook.seen
    assert own_text(conversation, tokenizer) == "You are right. Yes<|im_end|>"
    assert "Am I?\n\nBe kind." in tokenizer.decode(model.asked[1].token_ids)
    assert "bad" not in tokenizer.decode(conversation.transcript.ids)
    assert events[-1].completion_tokens > conversation.transcript.own_tokens, "the first attempt was sampled too"


def test_a_hook_sees_what_a_message_was_given_to_begin_with_and_a_new_attempt_begins_with_it_too(tokenizer):
    model, conversation, hook = ScriptedModel(tokenizer, " are bad.", " are right."), asked("Am I?"), Censor("You are bad")
    turn = Assistant(model, PARAMS).start(conversation, hooks=[hook], answer_prefix=Message.assistant("You"))
    turn.begin()
    events = []
    while turn.end is None:
        generation = turn.generation
        for delta in model.stream(generation):
            events += turn.take(delta)
            if turn.generation is not generation:
                break
    assert said(events) == " are right." and conversation.messages[-1].text == "You are right."
    assert [tokenizer.decode(one.token_ids).endswith("assistant\nYou") for one in model.asked] == [True, True]


def test_text_that_was_given_out_is_rolled_back(tokenizer):
    class Late(Hook):
        def check(self, draft, context, *, is_final):
            return Retry("too short") if is_final and len(draft.text) < 5 else Pass()

    model, conversation = ScriptedModel(tokenizer, "No", "No, never."), asked("Ever?")
    events = joined(Assistant(model, SamplingParams(max_tokens=50, seed=3)).turn(conversation, hooks=[Late()]))
    assert events[:3] == [TextDelta("No"), RolledBack("too short"), TextDelta("No, never.")]
    assert model.asked[0].token_ids == model.asked[1].token_ids
    assert model.asked[0].params.seed == 3 != model.asked[1].params.seed


@pytest.mark.parametrize("decision", [None, Refuse("a bad word", "I'd rather not.")])
def test_what_never_passes_is_refused_and_the_conversation_goes_on(tokenizer, decision):
    model, conversation = ScriptedModel(tokenizer, "bad", "bad", "bad", "Fine."), asked("Am I?")
    config = AssistantConfig(max_retries=2, refusal="No.")
    if decision is not None:
        del model.texts[1:3]
    assistant = Assistant(model, PARAMS, config=config)
    events = joined(assistant.turn(conversation, hooks=[Censor(decision=decision)]))
    refusal = "No." if decision is None else "I'd rather not."
    assert kinds(events) == [TextDelta, MessageEnd, TurnEnd] and said(events) == refusal
    assert events[-1].reason == "refused" and conversation.transcript.own_tokens == 0
    conversation.add(Message.user("And now?"))
    assert said(assistant.turn(conversation)) == "Fine."
    inputs = [message.as_template_input() for message in conversation.messages[:3]]
    assert list(model.asked[-1].token_ids) == tokenizer.apply_chat_template(inputs, add_generation_prompt=True)


def test_hooks_add_documents_and_decide_about_calls(tokenizer):
    class Guarded(Hook):
        """What retrieval and a guard do."""

        def before_generation(self, context):
            if context.round == 1:
                context.conversation.add_part(MessagePart("\n\nGraz lies on the Mur.", "document", "wiki"))

        def before_call(self, call, tool, context):
            if tool.name == "send" and context.conversation.is_tainted:
                return Deny("nothing is sent of a tainted conversation")
            return ToolCall(call.id, call.name, {"city": call.arguments["city"].upper()})

        def after_call(self, call, result, context):
            return ToolResult(result.text.replace("21", "22"))

    sent = []
    tools = [WEATHER, Tool("send", "", function=lambda: sent.append(1))]
    model = ScriptedModel(tokenizer, f"{GRAZ}{call_text('send', '{}')}", "Done.")
    conversation = asked()
    events = joined(Assistant(model, PARAMS, tools).turn(conversation, hooks=[Guarded()]))
    results = [event.result.text for event in events if isinstance(event, Returned)]
    assert results == ['{"city": "GRAZ", "degrees": 22}', "error: nothing is sent of a tainted conversation"] and not sent
    assert "lies on the Mur" in tokenizer.decode(model.asked[0].token_ids)
    assert [part.origin for part in conversation.messages[0].parts] == ["user", "document"]


# --- what ends early or cannot begin ---


def test_a_turn_that_is_left_keeps_what_it_gave_out(tokenizer):
    model, conversation = ScriptedModel(tokenizer, "One two three", "Four."), asked("Count")
    assistant = Assistant(model, PARAMS)
    events = assistant.turn(conversation)
    while not isinstance(event := next(events), TextDelta) or event.text != "w":
        pass
    events.close()
    assert conversation.messages[1].text == "One tw"
    conversation.add(Message.user("Go on"))
    list(assistant.turn(conversation))
    assert own_text(conversation, tokenizer) == "One twFour.<|im_end|>"


def test_what_a_hook_holds_back_is_not_kept_of_a_turn_that_is_left(tokenizer):
    model, conversation = ScriptedModel(tokenizer, "You are right. But bad"), asked("Am I?")
    events = Assistant(model, PARAMS).turn(conversation, hooks=[Censor()])
    next(events)
    events.close()
    assert [message.role for message in conversation.messages] == ["user"] and len(conversation.transcript) == 0


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(tokenizer, thinking_tokenizer):
    class Fails(ScriptedModel):
        def stream(self, generation):
            raise RequestError("too long")
            yield

    conversation = asked()
    with pytest.raises(RequestError, match="too long"):
        list(Assistant(Fails(tokenizer), PARAMS).turn(conversation))
    assert len(conversation.transcript) == 0 and [message.text for message in conversation.messages] == [
        "How warm is it in Graz?"
    ]
    list(Assistant(ScriptedModel(tokenizer, "Warm."), PARAMS).turn(conversation))
    with pytest.raises(RequestError, match="nothing that the assistant could answer"):
        list(Assistant(ScriptedModel(tokenizer), PARAMS).turn(conversation))


def test_settings_that_cannot_work_are_refused(tokenizer):
    model = ScriptedModel(tokenizer)
    with pytest.raises(ConfigError, match="two tools are called 'weather'"):
        Assistant(model, tools=[WEATHER, WEATHER])
    with pytest.raises(ConfigError, match="there is no tool format 'hermis'; did you mean 'hermes'"):
        Assistant(model, config=AssistantConfig(tool_format="hermis"))
    with pytest.raises(ConfigError, match="the tool bad: the schema is not valid"):
        Tool("bad", "", {"type": 3})
    with pytest.raises(ConfigError, match="thinking_budget: it takes a model of this machine"):
        Assistant(ApiModel(ChatClient("http://127.0.0.1:9/v1", "m")), config=AssistantConfig(thinking_budget=1))


def test_messages_of_an_api_become_messages_with_origins_and_go_back():
    given = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": "2", "tool_call_id": "a", "name": "f"},
    ]
    messages = as_messages(given)
    assert [part.origin for message in messages for part in message.parts] == ["system", "user", "tool"]
    back = [message.as_template_input() for message in messages]
    assert back[0] == given[0] and back[3] == given[3]
    assert back[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


def test_a_model_behind_an_api_answers_with_tools(monkeypatch):
    function = {"name": "weather", "arguments": '{"city": "Graz"}'}
    replies = [
        {"content": None, "reasoning_content": "hm", "tool_calls": [{"id": "x9", "type": "function", "function": function}]},
        {"content": "It is 21 degrees."},
    ]

    def respond(body, number):
        return 200, {}, json.dumps({"choices": [{"message": replies[number - 1], "finish_reason": "stop"}]}).encode()

    with serving(monkeypatch) as serve:
        server = serve(respond)
        conversation = asked()
        events = joined(Assistant(ApiModel(ChatClient(server.url, "m")), tools=[WEATHER]).turn(conversation))
    assert kinds(events) == [ThinkingDelta, Called, MessageEnd, Returned, TextDelta, MessageEnd, TurnEnd]
    assert said(events) == "It is 21 degrees." and len(conversation.transcript) == 0
    sent = server.requests[1][2]
    assert sent["tools"] == [WEATHER.description_in_chat]
    assert sent["messages"][1]["tool_calls"][0]["function"] == function
    assert sent["messages"][2]["tool_call_id"] == sent["messages"][1]["tool_calls"][0]["id"]
