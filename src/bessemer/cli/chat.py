"""`bessemer chat`, and `bessemer demo`: a chat with SmolLM2 after a look inside it."""

from __future__ import annotations

import contextlib
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.options import (
    ActivationBits,
    Adapter,
    Approve,
    ApproveTools,
    Device,
    MaxModelLen,
    McpServersConfig,
    MinP,
    Model,
    RepetitionPenalty,
    Runs,
    Speculate,
    Temperature,
    ToolTokens,
    TopK,
    TopP,
    print_view,
)
from bessemer.core.errors import RequestError

if TYPE_CHECKING:
    from bessemer.assistant.assistant import Assistant
    from bessemer.assistant.conversation import AssistantConfig, Conversation
    from bessemer.assistant.hooks import Hook
    from bessemer.assistant.messages import Message
    from bessemer.assistant.tools import Tool
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.sampler import SamplingParams
    from bessemer.retrieval.memory import ConversationMemory


_HELP = "/new starts over, /help lists all commands, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
_COMMANDS = {
    "/new": "start over: forget the conversation",
    "/help": "list the commands; /?",
    "/quit": "leave; /exit, /bye, Ctrl-D",
}
_QUIT, _ASK_HELP = ("/quit", "/exit", "/bye"), ("/help", "/?")
#: A line that is a command, not a question about a path.
_COMMAND = re.compile(r"/(\w+|\?)")
#: Stages whose models have been trained on plain text alone.
_BASE_STAGES = ("model", "pretrain")
#: A terminal's codes around the model's thinking.
_DIM, _PLAIN = "\033[2m", "\033[0m"


def chat(
    context: typer.Context,
    model: Model,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.", min=1)] = 256,
    thinking_budget: Annotated[
        int | None, typer.Option(help="Most tokens of thinking, after which the answer begins.", min=0)
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="After each answer, say how fast it came.")] = False,
    speculate: Speculate = None,
    adapter: Adapter = None,
    max_model_len: MaxModelLen = None,
    activation_bits: ActivationBits = None,
    mcp_servers_config: McpServersConfig = None,
    tool_tokens: ToolTokens = 4000,
    approve: Approve = "always",
    approve_tools: ApproveTools = False,
    memory: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Remember conversations in this folder, and find in it what fits a question."),
    ] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Talk with a model in the terminal."""
    from bessemer.agents.approvals import Approvals, AsksFor, approver_here
    from bessemer.assistant.conversation import AssistantConfig
    from bessemer.cli.named import (
        example_questions,
        find_served,
        given_options,
        mcp_tools,
        option_of,
        sampling_options,
        speculation,
    )
    from bessemer.inference.engine import Engine, EngineConfig

    asks_for = AsksFor.parse(approve)
    remembered = None
    if memory is not None:
        from bessemer.retrieval.memory import ConversationMemory

        # first, so that a wrong folder is said before the model is loaded
        remembered = ConversationMemory(memory)
    folder = find_served(model, runs)
    given = speculation(speculate, runs) | given_options(context, "max_model_len", "activation_bits")
    config = EngineConfig.parse(given, option_of("chat"))
    params_for = sampling_options(context)
    engine = Engine(folder, device=device, config=config)
    if engine.tokenizer.chat_template is None:
        raise RequestError(
            f"{model}: this tokenizer has no chat template, as base models have none; bessemer generate continues a text, and "
            "bessemer finetune makes a model that chats"
        )
    if adapter is None and _is_base(folder):
        print(f"note: {model} is not tuned on conversations; it continues texts more than it answers", file=sys.stderr)
    if adapter is not None:
        engine.load_adapter(adapter, adapter)
    with contextlib.ExitStack() as stack:
        calls = None
        if mcp_servers_config is not None:
            tools_for = stack.enter_context(mcp_tools(mcp_servers_config, tool_tokens, approve=approve_tools))
            calls = ToolCalls(tools_for, [Approvals(asks_for, approver_here())])
        converse(
            engine,
            params_for(engine),
            example_questions(folder, runs / model),
            system=system,
            config=AssistantConfig(thinking_budget=thinking_budget),
            speed=speed,
            adapter=adapter,
            calls=calls,
            memory=remembered,
        )


@dataclass(frozen=True)
class ToolCalls:
    """Tools that the assistant may call. tools_for: those to offer for a question. hooks: decide before each call."""

    tools_for: Callable[[str], Sequence[Tool]]
    hooks: Sequence[Hook]


def _is_base(folder: Path) -> bool:
    """Whether a stage of ours that trains on plain text alone made the model."""
    from bessemer.core.store import MANIFEST, read_json

    manifest = folder.parent / MANIFEST
    return manifest.exists() and read_json(manifest, "manifest").get("stage") in _BASE_STAGES


def converse(
    engine: Engine,
    params: SamplingParams,
    examples: list[str],
    *,
    system: str | None = None,
    config: AssistantConfig | None = None,
    speed: bool = False,
    opening: str | None = None,
    adapter: str | None = None,
    calls: ToolCalls | None = None,
    memory: ConversationMemory | None = None,
) -> None:
    """Read questions from standard input, print answers as they come, forget the oldest turn when the context is full.

    system: what every conversation begins with. speed: say after each answer how fast it came. opening: a first
    question, shown as if the user had typed it, at a terminal. adapter: one that the engine has, by its name. calls: tools that
    may be called; None: none. memory: of earlier conversations, which this one is added to; None: none.
    """
    from bessemer.assistant.assistant import Assistant, EngineModel
    from bessemer.assistant.conversation import Conversation
    from bessemer.assistant.messages import Message

    interactive = sys.stdin.isatty()
    if interactive:
        # Windows has no readline
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (its import gives `input` a history and line editing)
        print(engine.arithmetic)
        print(_HELP)
        for question in examples:
            print(f"  e.g. {question}")
    assistant = Assistant(EngineModel(engine, adapter=adapter), params, config=config)
    start = [Message.system(system)] if system else []
    conversation, identity = Conversation(start), uuid.uuid4().hex
    for question in _questions(interactive, opening):
        if not question:
            continue
        if question in _QUIT:
            return
        if question in _ASK_HELP:
            print("\n".join(f"{command:7}{does}" for command, does in _COMMANDS.items()))
            continue
        if question == "/new":
            conversation, identity = Conversation(start), uuid.uuid4().hex
            continue
        if _COMMAND.fullmatch(question):
            print(f"there is no command {question}; /help lists all commands", file=sys.stderr)
            continue
        message = Message.user(question)
        if memory is not None:
            message = _with_memory(memory, message, identity, engine.longest)
        conversation.add(message)
        try:
            _answer(assistant, conversation, len(start), speed, question, calls)
        except RequestError as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
            conversation.take_back()
        else:
            if memory is not None:
                _remember(memory, question, conversation, identity)


def _with_memory(memory: ConversationMemory, question: Message, identity: str, longest: int) -> Message:
    """A question below what earlier conversations have on it. longest: tokens of the model's context."""
    from bessemer.retrieval.memory import with_memories
    from bessemer.retrieval.search import MOST_CHARACTERS

    memories = memory.recall(question.text[:MOST_CHARACTERS], without=identity)
    # a token has about four characters, and a quarter of the context is for memories
    return with_memories(question, memories, longest)


def _remember(memory: ConversationMemory, question: str, conversation: Conversation, identity: str) -> None:
    """Add a question and its answer, if there is one, as they were said."""
    from bessemer.retrieval.memory import turn_now

    turns = [turn_now("user", question, identity)]
    if conversation.messages[-1].role == "assistant":
        turns.append(turn_now("assistant", conversation.messages[-1].text, identity))
    memory.remember(turns)


def _questions(interactive: bool, opening: str | None) -> Iterator[str]:
    """At a terminal the opening, then the lines of standard input."""
    prompt = "you> " if interactive else ""
    if interactive and opening is not None:
        print(f"{prompt}{opening}")
        yield opening
    while True:
        try:
            question = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield question


def _answer(
    assistant: Assistant, conversation: Conversation, start: int, speed: bool, question: str, calls: ToolCalls | None
) -> None:
    """Print the answer to the last message. start: messages that are never forgotten."""
    tools = [] if calls is None else calls.tools_for(question)
    hooks = [] if calls is None else calls.hooks
    while True:
        try:
            _print_turn(assistant, conversation, speed, tools, hooks)
        except RequestError:
            later = [place for place, message in enumerate(conversation.messages) if message.role == "user" and place > start]
            # the question alone is too long
            if not later:
                raise
            conversation.forget(start, later[0])
            print("(the context is full: the oldest question and answer are forgotten)", file=sys.stderr)
        else:
            return


def _print_turn(
    assistant: Assistant, conversation: Conversation, speed: bool, tools: Sequence[Tool] = (), hooks: Sequence[Hook] = ()
) -> None:
    """Print an answer as it comes, at a terminal with the dimmed thinking before it. Ctrl-C ends it."""
    from bessemer.agents.approvals import described
    from bessemer.assistant.messages import Called, Returned, TextDelta, ThinkingDelta

    shows_thinking = sys.stdout.isatty()
    thought = False
    start = time.perf_counter()
    times: list[float] = []
    before = conversation.transcript.own_tokens
    events = assistant.turn(conversation, hooks=hooks, tools=tools)
    try:
        for event in events:
            times.append(time.perf_counter())
            match event:
                case ThinkingDelta(text) if shows_thinking:
                    sys.stdout.write(f"{_DIM}{text}{_PLAIN}")
                    thought = True
                case TextDelta(text):
                    sys.stdout.write(f"\n\n{text}" if thought else text)
                    thought = False
                case Called(call):
                    print(f"\n(calls {described(call.name, call.arguments)})", file=sys.stderr)
                case Returned(_, result):
                    print(f"({described('it failed:' if result.is_error else 'result:', result.text, 200)})", file=sys.stderr)
            sys.stdout.flush()
    except KeyboardInterrupt:
        events.close()
        if conversation.messages[-1].role != "assistant":
            conversation.take_back()
    print()
    tokens = conversation.transcript.own_tokens - before
    if speed and times:
        print(_speed(start, times, tokens), file=sys.stderr)


def _speed(start: float, times: list[float], tokens: int) -> str:
    """The speed of an answer. start, times: of the request, and of each part of the answer, in seconds."""
    rest = f", the others {(tokens - 1) / (times[-1] - times[0]):.1f} a second" if tokens > 1 and times[-1] > times[0] else ""
    return f"({tokens} tokens: the first after {times[0] - start:.2f} s{rest})"


# rounding does not change this answer; asked about France, the model begins in French about as often
_OPENING = "What is the capital of Japan?"
_EXAMPLES = ["Write two sentences about the sea.", "Why is the sky blue?"]


def demo(
    inspect: Annotated[str | None, typer.Option(metavar="TEXT", help="Look inside the model while it reads a text.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", "--install", help="Download the model (98 MB), if missing, without asking.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Chat with SmolLM2, a real model of 135 million parameters. `bessemer chat smollm2` is the same model."""
    from bessemer.cli.named import find_model

    model = find_model("smollm2", runs, yes=yes)
    if inspect is not None:
        _look(model, inspect, device)
        return
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.sampler import SamplingParams

    engine = Engine(model, device=device)
    params = SamplingParams.parse({"max_tokens": max_tokens, "temperature": temperature, "seed": seed}, "demo")
    if sys.stdin.isatty():
        print(f"SmolLM2-135M-Instruct, {model}")
    converse(engine, params, _EXAMPLES, speed=True, opening=_OPENING)


def _look(model: Path, text: str, device: str) -> None:
    """Print what `bessemer inspect` prints, without the slow ablation."""
    import shlex

    from bessemer.inspection.inspect import inspect
    from bessemer.model.device import choose_device
    from bessemer.model.storage.folder import load_model
    from bessemer.tokenization.tokenizer import load_tokenizer
    from bessemer.views.inspection_terminal import show_inspection

    inspection = inspect(load_model(model, choose_device(device)), load_tokenizer(model), text, ablate=False)
    print_view(show_inspection(inspection))
    print(f"\nas a page, with every head: bessemer inspect smollm2 {shlex.quote(text)} --out page.html")
