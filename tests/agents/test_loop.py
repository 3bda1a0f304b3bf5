"""The agent: its calls, budgets, approvals, loops, and a journal that is damaged."""

from __future__ import annotations

import json

import pytest

from bessemer.agents.approvals import Approvals, AsksFor, TerminalApprover, nobody
from bessemer.agents.config import Budget
from bessemer.agents.journal import Journal
from bessemer.agents.loop import AgentTool
from bessemer.assistant.hooks import Deny, Hook
from bessemer.assistant.messages import BadCall, Message, Returned, ToolCall
from bessemer.assistant.tools import Tool
from bessemer.core.errors import ArtefactError, ConfigError
from tests.agents.scripted import StepModel, agent_of, begin, ended

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


class Weather:
    """A tool that counts its calls; its result changes only where it is told to."""

    def __init__(self, changes=False):
        self.cities, self.changes = [], changes

    def __call__(self, city):
        self.cities.append(city)
        return f"{len(self.cities) if self.changes else 21} degrees"

    def tool(self, name="weather"):
        return AgentTool(Tool(name, "The weather.", CITY, self))


ROME = ("weather", {"city": "Rome"})


def test_calls_are_made_and_the_answer_comes_with_what_was_used(tmp_path):
    weather = Weather()
    model = StepModel([ROME, ("weather", {"city": "Oslo"})], "It is warm.")
    with begin(tmp_path / "task") as journal:
        end = ended(agent_of(model, [weather.tool()], journal))
    assert (end.reason, end.answer, end.steps) == ("answer", "It is warm.", 2)
    assert weather.cities == ["Rome", "Oslo"]
    assert [message["content"] for message in model.asked[1] if message["role"] == "tool"] == ["21 degrees"] * 2
    # what the tool gave is marked, and so is what was written after it
    with Journal.resume(tmp_path / "task") as journal:
        *_, result, answer = journal.state.messages
        assert result.parts[0].origin == "tool" and result.parts[0].source == "weather" and answer.is_derived


def test_an_answered_task_is_not_worked_on_again_until_the_user_says_more(tmp_path):
    from bessemer.agents.journal import message_as_json

    weather = Weather()
    with begin(tmp_path / "task") as journal:
        ended(agent_of(StepModel(ROME, "Warm."), [weather.tool()], journal))
    with Journal.resume(tmp_path / "task") as journal:
        model = StepModel("never")
        assert ended(agent_of(model, [weather.tool()], journal)).answer == "Warm." and model.asked == []
        journal.write("message", message=message_as_json(Message.user("And now?")))
        assert ended(agent_of(StepModel("", "", "Still warm."), [weather.tool()], journal)).answer == "Still warm."
    assert weather.cities == ["Rome"]


def test_unknown_tools_and_unreadable_calls_are_answered_with_the_reason(tmp_path):
    model = StepModel([("sudo", {}), BadCall("<tool_call>{", "no JSON")], "Sorry.")
    with begin(tmp_path / "task") as journal:
        results = [
            event.result.text for event in agent_of(model, [Weather().tool()], journal).run() if isinstance(event, Returned)
        ]
    assert any("there is no tool 'sudo'; there are weather" in text for text in results)
    assert any("this call cannot be read: no JSON" in text for text in results)
    with Journal.resume(tmp_path / "task") as journal:
        assert len([message for message in journal.state.messages if message.role == "tool"]) == 2


@pytest.mark.parametrize(
    ("budget", "reason", "calls"),
    [({"steps": 2}, "steps", 1), ({"seconds": 5.0}, "seconds", 2)],
    ids=str,
)
def test_a_budget_ends_the_task_and_a_larger_one_goes_on(tmp_path, budget, reason, calls):
    weather = Weather(changes=True)
    ticks = iter(range(10**6))
    model = StepModel(*[ROME] * 4, "Warm.")
    with begin(tmp_path / "task") as journal:
        agent = agent_of(model, [weather.tool()], journal, budget=Budget(**budget), clock=lambda: float(next(ticks)))
        end = ended(agent)
    assert end.reason == reason and len(weather.cities) == calls
    with Journal.resume(tmp_path / "task") as journal:
        assert ended(agent_of(model, [weather.tool()], journal)).answer == "Warm."
    assert len(weather.cities) == 4


def test_the_budget_of_tokens_counts_prompts_and_completions(tmp_path, tokenizer):
    from tests.assistant.scripted import ScriptedModel, call_text

    model = ScriptedModel(tokenizer, *[call_text("weather", '{"city": "Rome"}')] * 9, context_length=100_000)
    weather = Weather(changes=True)
    with begin(tmp_path / "task") as journal:
        end = ended(agent_of(model, [weather.tool()], journal, budget=Budget(tokens=1500)))
    prompts = [len(generation.token_ids) for generation in model.asked]
    assert end.reason == "tokens" and sum(prompts[:-1]) < 1500 <= end.tokens and end.tokens > sum(prompts)


def test_results_that_fill_the_context_end_the_task(tmp_path, tokenizer):
    from tests.assistant.scripted import ScriptedModel, call_text

    model = ScriptedModel(tokenizer, call_text("large", "{}"), "never")
    tool = AgentTool(Tool("large", "Much.", function=lambda: "x" * 10_000))
    with begin(tmp_path / "task") as journal:
        assert ended(agent_of(model, [tool], journal)).reason == "length"
    assert model.texts == ["never"]


def test_the_same_call_with_the_same_result_is_refused_and_then_the_agent_stops(tmp_path):
    weather = Weather()
    with begin(tmp_path / "task") as journal:
        end = ended(agent_of(StepModel(ROME), [weather.tool()], journal, budget=Budget(steps=50)))
    assert end.reason == "loop" and len(weather.cities) == 3 and end.steps == 6


def test_two_calls_in_turn_are_a_loop_too_and_a_call_whose_results_change_is_none(tmp_path):
    steps = [ROME, ("weather", {"city": "Oslo"})] * 20
    weather = Weather()
    with begin(tmp_path / "turns") as journal:
        end = ended(agent_of(StepModel(*steps), [weather.tool()], journal, budget=Budget(steps=40)))
    assert end.reason == "loop" and len(weather.cities) == 6
    clock = Weather(changes=True)
    with begin(tmp_path / "clock") as journal:
        assert ended(agent_of(StepModel(*[ROME] * 12, "Done."), [clock.tool()], journal)).reason == "answer"
    assert len(clock.cities) == 12


def test_a_tool_that_hangs_or_returns_a_megabyte_or_raises_does_not_stop_the_agent(tmp_path):
    import threading

    stuck = threading.Event()
    tools = [
        AgentTool(Tool("hang", "Hangs.", function=lambda: stuck.wait(30), time_limit=0.05)),
        AgentTool(Tool("large", "A megabyte.", function=lambda: "x" * 1_000_000)),
        AgentTool(Tool("raises", "Raises.", function=lambda: 1 / 0)),
    ]
    with begin(tmp_path / "task") as journal:
        agent = agent_of(StepModel([("hang", {}), ("large", {}), ("raises", {})], "Done."), tools, journal)
        texts = [event.result.text for event in agent.run() if isinstance(event, Returned)]
    stuck.set()
    assert "took longer than 0.05 s" in texts[0] and len(texts[1]) < 20_100 and "ZeroDivisionError" in texts[2]


def test_the_policy_s_hook_decides_before_anybody_is_asked(tmp_path):
    class Policy(Hook):
        def before_call(self, call, tool, context):
            return Deny("the conversation is tainted") if context.conversation.is_tainted else call

    asked = []

    def approver(call, tool):
        asked.append(call.name)
        return True

    weather, other = Weather(), Weather()
    model = StepModel(ROME, ("send", {"city": "Rome"}), "Done.")
    hooks = [Policy(), Approvals(AsksFor(None), approver)]
    with begin(tmp_path / "task") as journal:
        ended(agent_of(model, [weather.tool(), other.tool("send")], journal, hooks=hooks))
    assert asked == ["weather"] and other.cities == []
    assert "the conversation is tainted" in model.asked[2][-1]["content"]


def test_what_nobody_allows_is_not_called(tmp_path):
    weather = Weather()
    with begin(tmp_path / "task") as journal:
        ended(agent_of(StepModel(ROME, "Sorry."), [weather.tool()], journal, hooks=[Approvals(AsksFor(None), nobody)]))
    assert weather.cities == []


@pytest.mark.parametrize(
    ("given", "asks", "does_not"),
    [("always", "any", None), ("never", None, "any"), ("tools=send,files__*", "files__write", "weather")],
)
def test_which_calls_ask(given, asks, does_not):
    asks_for = AsksFor.parse(given)
    assert asks is None or asks_for.includes(asks)
    assert does_not is None or not asks_for.includes(does_not)


@pytest.mark.parametrize("given", ["sometimes", "tools=", "tools"])
def test_any_other_approval_is_refused(given):
    with pytest.raises(ConfigError, match="always, never, or tools="):
        AsksFor.parse(given)


def test_a_person_at_the_terminal_is_asked_until_they_say_always():
    answers, shown = iter(["what?", "n", "a"]), []
    approver = TerminalApprover(lambda prompt: next(answers), shown.append)
    call = ToolCall("call00001", "send", {"to": "\x1b[2Kanna"})
    tool = Weather().tool("send").tool
    assert [approver(call, tool) for _ in range(3)] == [False, True, True]
    # what a model wrote cannot draw over the question
    assert "\x1b" not in shown[0] and "anna" in shown[0]


def test_without_a_terminal_the_answer_is_no():
    def closed(prompt):
        raise EOFError

    assert not TerminalApprover(closed, lambda line: None)(ToolCall("call00001", "send", {}), Weather().tool().tool)


def test_a_last_line_that_was_cut_off_is_left_out_and_damage_elsewhere_is_one_line(tmp_path):
    folder = tmp_path / "task"
    with begin(folder) as journal:
        ended(agent_of(StepModel(ROME, "Warm."), [Weather().tool()], journal))
    path = folder / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "mess')
    with Journal.resume(folder) as journal:
        assert journal.state.end["reason"] == "answer"
    assert path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    bad = {
        "line 2": [lines[0], b"{\n", *lines[2:]],
        "line 3": [lines[0], lines[1], json.dumps({"event": "done", "call": "call99999"}).encode() + b"\n"],
        "does not begin with a task": lines[1:],
    }
    for said, content in bad.items():
        path.write_bytes(b"".join(content))
        with pytest.raises(ArtefactError, match=said) as raised, Journal.resume(folder):
            pass
        assert "\n" not in str(raised.value)


def test_two_processes_do_not_work_on_one_task_and_a_task_is_not_begun_twice(tmp_path):
    with begin(tmp_path / "task"):
        with pytest.raises(ArtefactError, match="another process is at work"), Journal.resume(tmp_path / "task"):
            pass
    with pytest.raises(ArtefactError, match="there is a task in it already"), begin(tmp_path / "task"):
        pass


def test_tools_that_cannot_be_told_apart_or_that_a_client_runs_are_refused(tmp_path):
    with begin(tmp_path / "task") as journal:
        with pytest.raises(ConfigError, match="two tools are called 'weather'"):
            agent_of(StepModel(""), [Weather().tool(), Weather().tool()], journal)
        with pytest.raises(ConfigError, match="no client"):
            agent_of(StepModel(""), [AgentTool(Tool("ask", "Asks."))], journal)
