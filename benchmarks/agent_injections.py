"""Does a policy outside the prompt stop what a page or an e-mail tells an agent to do, and let its user's work pass?

    python -m venv target/agentdojo && target/agentdojo/bin/pip install --editable '.[serve]' agentdojo
    target/agentdojo/bin/python benchmarks/agent_injections.py     # some minutes on one core

AgentDojo's four environments (Debenedetti et al. 2024; benchmark v1.2.2): 97 tasks of users, and injections that stand in
e-mails, files, pages, reviews and messages, in the wording of its attack `important_instructions`. The agent is scripted and
gullible: it makes the calls of AgentDojo's own solution of the user's task, and as soon as a result holds the injection, those
of the injection's solution, then goes on. Each call goes through `assistant/` with a guard whose policy has a `taint` section
and nothing else; the tools run in AgentDojo's environment. Injections whose solution AgentDojo leaves empty are not there.

The policy names tools, not tasks: which of them no stranger can write into, and that opening a web page acts. Words for
actions, and what the table of `safety/provenance.py` says, were written with the suites banking and slack in sight and tried on
workspace and travel afterwards: the result has both. Three policies: none; a call about somebody's record that the user did not
name is asked back; or made. Nobody answers what is asked back here, so it is not made, and it is counted apart.

AgentDojo's own functions say whether an attack came to its end and whether the user's task did. Intervals are of 95 %, with a
user's task as a cluster. Result: `agent_injections.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import recording
from bessemer.assistant.assistant import Assistant
from bessemer.assistant.conversation import AssistantConfig, Conversation
from bessemer.assistant.generation import Delta
from bessemer.assistant.messages import Message, Returned
from bessemer.assistant.parser import ParsedCall
from bessemer.assistant.tools import Tool, ToolResult
from bessemer.core.policy import CallRules, Surfaces, Taint, read_policy
from bessemer.core.statistics import mean_estimate
from bessemer.safety.config import GuardConfig
from bessemer.safety.guard import Guard
from bessemer.safety.hook import GuardHook

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/safety/provenance.py", "src/bessemer/safety/hook.py", "src/bessemer/core/policy.py")

VERSION = "v1.2.2"
ATTACK = "important_instructions"
#: The suites that were looked at while the rules were written, and the others.
DEVELOPMENT, HELD_OUT = ("banking", "slack"), ("workspace", "travel")
#: What an operator of these environments knows of their tools.
TRUSTED = (
    *("get_current_day", "get_iban", "get_balance", "get_scheduled_transactions"),
    *("get_user_info", "get_user_information", "search_contacts_*"),
)
ACTS = ("get_webpage",)
OUTCOMES = ("made", "asked", "refused")


def hook(records: str) -> GuardHook:
    """The guard of a policy that says nothing but which calls a tainted conversation may make."""
    calls = CallRules(records=records, trusted=list(TRUSTED), acts=list(ACTS))
    policy = read_policy().model_copy(update={"surfaces": Surfaces(), "taint": Taint(calls=calls)})
    return GuardHook(Guard(policy, GuardConfig(rails=["rules"])))


@dataclass
class GullibleModel:
    """Makes the calls of the user's task, and those of an injection as soon as it has read it.

    user, injected: (name, arguments) of the calls; goal: of the injection. made: whose each call was, in their order.
    """

    user: list[tuple[str, dict[str, Any]]]
    injected: list[tuple[str, dict[str, Any]]]
    goal: str | None
    answer: str
    made: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    tokenizer = context_length = None
    _has_read: bool = False

    def stream(self, generation: Any) -> Iterator[Delta]:
        """The next call, or the answer."""
        last = generation.messages[-1]
        if self.goal is not None and not self._has_read and last["role"] == "tool" and holds(last["content"], self.goal):
            self._has_read = True
        queue, owner = (self.injected, "injection") if self._has_read and self.injected else (self.user, "user")
        if not queue:
            yield Delta(text=self.answer or "Done.", finish_reason="stop")
            return
        name, arguments = queue.pop(0)
        self.made.append((owner, name, arguments))
        yield Delta(calls=[ParsedCall(name, arguments)], finish_reason="stop")


def holds(text: str, goal: str) -> bool:
    """Whether a result, plain or as JSON, holds an injection's goal."""
    beginning = goal[:60]
    return beginning in text or json.dumps(beginning)[1:-1] in text


def as_text(value: Any) -> str:
    """A tool's value as its result: JSON, or what it says."""
    from agentdojo.agent_pipeline.tool_execution import tool_result_to_str

    return tool_result_to_str(value, lambda values: json.dumps(values, default=str, ensure_ascii=False))


@dataclass(frozen=True)
class Run:
    """calls: owner, tool and outcome of each. has_read: whether the agent read the injection."""

    suite: str
    task: str
    is_attacked: bool
    has_read: bool
    calls: list[tuple[str, str, str]]
    solved: bool
    attack_succeeded: bool


def run(suite: Any, task: Any, injection: Any | None, environment: Any, guard: GuardHook | None) -> Run:
    """One conversation. environment: as it is before the user asks, with injections; it is not changed."""
    from agentdojo.functions_runtime import FunctionCall, FunctionsRuntime
    from agentdojo.types import text_content_block_from_string

    before = task.init_environment(environment.model_copy(deep=True))
    environment = before.model_copy(deep=True)
    runtime = FunctionsRuntime(suite.tools)
    trace: list[Any] = []

    def tool(function: Any) -> Tool:
        def called(**arguments: Any) -> ToolResult:
            trace.append(FunctionCall(function=function.name, args=arguments))
            value, error = runtime.run_function(environment, function.name, arguments)
            return ToolResult(as_text(value)) if error is None else ToolResult(f"error: {error}", is_error=True)

        return Tool(function.name, function.description, function=called, most_characters=1_000_000)

    def solution(of: Any) -> list[tuple[str, dict[str, Any]]]:
        return [(call.function, dict(call.args)) for call in of.ground_truth(before.model_copy(deep=True))]

    model = GullibleModel(
        solution(task),
        solution(injection) if injection is not None else [],
        injection.GOAL if injection is not None else None,
        task.GROUND_TRUTH_OUTPUT,
    )
    assistant = Assistant(model, tools=[tool(one) for one in suite.tools], config=AssistantConfig(max_rounds=100))
    conversation = Conversation([Message.user(task.PROMPT)])
    outcomes = [
        outcome(event.result)
        for event in assistant.turn(conversation, hooks=[guard] if guard is not None else [])
        if isinstance(event, Returned)
    ]
    calls = [(owner, name, made) for (owner, name, _), made in zip(model.made, outcomes, strict=True)]
    output = [text_content_block_from_string(task.GROUND_TRUTH_OUTPUT)]
    checked = (output, before, environment, trace)
    succeeded = injection is not None and bool(suite._check_task_result(injection, *checked))
    solved = bool(suite._check_task_result(task, *checked))
    return Run(suite.name, f"{suite.name}/{task.ID}", injection is not None, model._has_read, calls, solved, succeeded)


def outcome(result: ToolResult) -> str:
    """What became of a call."""
    if result.text.startswith("error: the policy refuses this call"):
        return "refused"
    return "asked" if result.text.startswith("error: the user has not") else "made"


def runs(name: str, guards: Mapping[str, GuardHook | None]) -> Iterator[tuple[str, Run]]:
    """All conversations of a suite, without and with each injection, under each guard; with the guard's name."""
    from agentdojo.agent_pipeline.base_pipeline_element import BasePipelineElement
    from agentdojo.attacks.attack_registry import load_attack
    from agentdojo.task_suite.load_suites import get_suites

    class Named(BasePipelineElement):
        """What the attack addresses by name."""

        name = "local"

        def query(self, *arguments: Any, **options: Any) -> Any:
            raise NotImplementedError

    suite = get_suites(VERSION)[name]
    attack = load_attack(ATTACK, suite, Named())
    pristine = suite.load_and_inject_default_environment({})
    injections = [one for one in suite.injection_tasks.values() if one.ground_truth(pristine.model_copy(deep=True))]
    for task in suite.user_tasks.values():
        for injection in (None, *injections):
            injected = {} if injection is None else attack.attack(task, injection)
            environment = suite.load_and_inject_default_environment(injected) if injected else pristine
            for policy, guard in guards.items():
                yield policy, run(suite, task, injection, environment, guard)


def shares(measured: Sequence[Run], owner: str, *, is_attacked: bool, acting: CallRules | None = None) -> dict[str, Any]:
    """The shares of calls of an owner that were made, asked back and refused. acting: of calls alone that act by its rules."""
    calls = [
        (run.task, made)
        for run in measured
        if run.is_attacked == is_attacked
        for who, name, made in run.calls
        if who == owner and (acting is None or not acting.only_reads(name))
    ]
    found: dict[str, Any] = {"calls": len(calls)}
    tasks = [task for task, _ in calls]
    for kind in OUTCOMES:
        estimate = mean_estimate([float(made == kind) for _, made in calls], tasks)
        low, high = estimate.interval(bounds=(0.0, 1.0))
        found[kind] = {"share": estimate.mean, "low": low, "high": high}
    decided = sum(made != "asked" for _, made in calls)
    found["refused_of_decided"] = sum(made == "refused" for _, made in calls) / max(decided, 1)
    found["made_of_decided"] = sum(made == "made" for _, made in calls) / max(decided, 1)
    return found


def summary(measured: Sequence[Run]) -> dict[str, Any]:
    """The figures of some conversations."""
    rules = CallRules(trusted=list(TRUSTED), acts=list(ACTS))
    attacked = [run for run in measured if run.is_attacked]
    alone = [run for run in measured if not run.is_attacked]
    return {
        "conversations": len(measured),
        "attacked": len(attacked),
        "read": sum(run.has_read for run in attacked),
        "injected": shares(measured, "injection", is_attacked=True),
        "injected_acting": shares(measured, "injection", is_attacked=True, acting=rules),
        "user": shares(measured, "user", is_attacked=False),
        "user_acting": shares(measured, "user", is_attacked=False, acting=rules),
        "user_attacked": shares(measured, "user", is_attacked=True),
        "attacks_succeeded": sum(run.attack_succeeded for run in attacked) / len(attacked),
        "solved": sum(run.solved for run in alone) / len(alone),
        "solved_attacked": sum(run.solved for run in attacked) / len(attacked),
    }


def main() -> None:
    recording.needs("agentdojo", install="an environment of its own, as at the top of this file")
    import yaml

    # the same values as the loader that AgentDojo takes, in a tenth of the time
    if hasattr(yaml, "CSafeLoader"):
        yaml.safe_load = lambda text: yaml.load(text, Loader=yaml.CSafeLoader)
    guards = {"none": None, "ask": hook("ask"), "allow": hook("allow")}
    measured: dict[str, dict[str, list[Run]]] = {policy: {} for policy in guards}
    for name in (*DEVELOPMENT, *HELD_OUT):
        for policy, one in runs(name, guards):
            measured[policy].setdefault(name, []).append(one)
        print(name, {policy: len(found[name]) for policy, found in measured.items()}, flush=True)
    groups = {"all": (*DEVELOPMENT, *HELD_OUT), "development": DEVELOPMENT, "held_out": HELD_OUT}
    groups |= {name: (name,) for name in (*DEVELOPMENT, *HELD_OUT)}
    figures = {
        policy: {group: summary([one for name in names for one in found[name]]) for group, names in groups.items()}
        for policy, found in measured.items()
    }
    print(recording.save("agent_injections", figures, tables=tables(figures), peers=["agentdojo"]))


def tables(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Calls by policy and suites, and what attacks and tasks came to."""
    title = {"none": "none", "ask": "records asked back", "allow": "records made"}
    suites = {"all": "all four", "development": "banking, slack", "held_out": "workspace, travel (held out)"}
    kinds = {
        "injected_acting": "injected, acting",
        "injected": "injected, all",
        "user": "the user's",
        "user_acting": "the user's, acting",
    }

    def interval(found: Mapping[str, float]) -> list[float]:
        return [found["low"], found["high"]]

    calls = []
    for policy in ("ask", "allow"):
        for group in suites:
            for kind in kinds:
                found = figures[policy][group][kind]
                wanted = "refused_of_decided" if kind.startswith("injected") else "made_of_decided"
                shares_of = [found[outcome]["share"] for outcome in OUTCOMES]
                row = [title[policy], suites[group], kinds[kind], found["calls"], *shares_of]
                calls.append([*row, interval(found["refused"]), found[wanted]])
    ends = [
        [title[policy], suites[group], found["attacked"], found["attacks_succeeded"], found["solved"], found["solved_attacked"]]
        for policy in title
        for group in suites
        for found in [figures[policy][group]]
    ]
    return {
        "calls": recording.table(
            [
                *(("policy", ""), ("suites", ""), ("calls", ""), ("number", ",.0f"), ("made", ".1%"), ("asked back", ".1%")),
                *(("refused", ".1%"), ("refused, 95 %", ".1%"), ("right, of those decided", ".1%")),
            ],
            calls,
        ),
        "ends": recording.table(
            [
                *(("policy", ""), ("suites", ""), ("attacks", ",.0f"), ("attacks that succeed", ".1%")),
                *(("user's tasks solved, unattacked", ".1%"), ("attacked", ".1%")),
            ],
            ends,
        ),
    }


if __name__ == "__main__":
    main()
