"""`bessemer chat`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.core.errors import RequestError

if TYPE_CHECKING:
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.sampler import SamplingParams

_HELP = "/new starts over, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(
    model: Annotated[str, typer.Argument(help="A model's folder or a run's name.")],
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="After each answer, say how fast it came.")] = False,
    speculate: Annotated[
        str | None, typer.Option(help="Speculative decoding: ngram, mtp, or the folder of a draft model.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder of a low-rank adapter of the model.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="At most this many tokens of prompt and answer together; the model's context.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Talk with a model in the terminal."""
    from bessemer.cli.named import example_questions, find_model, option_of, speculation
    from bessemer.inference.engine import Engine, EngineConfig
    from bessemer.inference.sampling.sampler import SamplingParams

    folder = find_model(model, runs)
    config = EngineConfig.parse(speculation(speculate) | {"max_model_len": max_model_len}, option_of("chat"))
    engine = Engine(folder, device=device, config=config)
    params = SamplingParams.parse(
        {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}, "chat"
    )
    if adapter is not None:
        engine.load_adapter(adapter, adapter)
    start = [{"role": "system", "content": system}] if system else []
    converse(engine, params, start, example_questions(folder), speed=speed, adapter=adapter)


def converse(
    engine: Engine,
    params: SamplingParams,
    start: list[dict[str, str]],
    examples: list[str],
    *,
    speed: bool = False,
    opening: str | None = None,
    adapter: str | None = None,
) -> None:
    """Read questions from standard input, print answers as they come, forget the oldest turn when the context is full.

    start: what every conversation begins with. speed: say after each answer how fast it came. opening: a first question,
    asked of the user at the terminal. adapter: one that the engine has, by its name.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        # Windows has none
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (its import gives `input` a history and line editing)
        print(engine.arithmetic)
        print(_HELP)
        for question in examples:
            print(f"  e.g. {question}")
    messages = list(start)
    for question in _questions(interactive, opening):
        if not question:
            continue
        if question in ("/quit", "/exit"):
            return
        if question == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": question})
        try:
            answer = _answer(engine, params, messages, start, speed, adapter)
        except RequestError as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _questions(interactive: bool, opening: str | None) -> Iterator[str]:
    """The opening, where somebody sits there to see it, and then the lines of standard input."""
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
    engine: Engine,
    params: SamplingParams,
    messages: list[dict[str, str]],
    start: list[dict[str, str]],
    speed: bool,
    adapter: str | None,
) -> str:
    while True:
        try:
            asked = time.perf_counter()
            stream = engine.stream_chat(messages, params, adapter=adapter)
            parts: list[str] = []
            times: list[float] = []
            try:
                for chunk in stream:
                    times += [time.perf_counter()] * len(chunk.token_ids)
                    parts.append(chunk.text)
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                stream.close()
            print()
            if speed and times:
                print(_speed(asked, times), file=sys.stderr)
            return "".join(parts)
        except RequestError:
            # the question alone is too long
            if len(messages) <= len(start) + 1:
                raise
            del messages[len(start) : len(start) + 2]
            print("(the context is full: the oldest question and answer are forgotten)", file=sys.stderr)


def _speed(asked: float, times: list[float]) -> str:
    """How fast an answer came, from when it was asked for and when each token was there, in seconds."""
    rest = f", the others {(len(times) - 1) / (times[-1] - times[0]):.1f} a second" if len(times) > 1 else ""
    return f"({len(times)} tokens: the first after {times[0] - asked:.2f} s{rest})"
