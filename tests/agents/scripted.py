"""A model behind an API that does the next thing of a script, wherever its conversation begins again."""

from __future__ import annotations

from bessemer.agents.journal import Journal
from bessemer.agents.loop import Agent, AgentEnd
from bessemer.assistant.assistant import Assistant
from bessemer.assistant.generation import Delta
from bessemer.assistant.messages import Message
from bessemer.assistant.parser import ParsedCall


class StepModel:
    """steps: what each message is, by its number in the conversation: a text; a call, as (name, arguments); or several calls.
    The last one is repeated. asked: the messages of each prompt."""

    tokenizer = None
    context_length = None

    def __init__(self, *steps):
        self.steps, self.asked = steps, []

    def stream(self, generation):
        self.asked.append(list(generation.messages))
        done = sum(message["role"] == "assistant" for message in generation.messages)
        step = self.steps[min(done, len(self.steps) - 1)]
        if isinstance(step, str):
            yield Delta(text=step, finish_reason="stop")
        else:
            calls = [step] if isinstance(step, tuple) else step
            calls = [ParsedCall(*call) if isinstance(call, tuple) else call for call in calls]
            yield Delta(text="", calls=calls, finish_reason="stop")


def begin(folder, task="Do it."):
    return Journal.begin(folder, [Message.system("You act."), Message.user(task)], model="scripted")


def ended(agent: Agent) -> AgentEnd:
    """The end of an agent's work."""
    *_, end = agent.run()
    assert isinstance(end, AgentEnd)
    return end


def agent_of(model, tools, journal, **options):
    return Agent(Assistant(model), tools, journal, **options)
