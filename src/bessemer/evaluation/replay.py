"""Replay: greedy answers to reference prompts by one model in several engines, which should be the same tokens.

A model that is exported, quantised, merged or given an adapter can come out broken in ways that no single engine shows: another
template, another begin token, a matrix in another order. So our engine, `transformers` and llama.cpp answer the same prompts,
from whatever form each opens. Where two answers part, the two tokens that compete there are nearly equally likely if only
rounding parts them; their gap in logits says so. A larger gap is a defect: of an export, or of an engine.

A reference and another engine agree up to the first token that differs; each then scores both tokens after the same prefix. The
gap is the larger of the two engines' differences of logits.

Where weights are codes, `transformers` decodes the file into floats, and is the reference. Our engine multiplies the codes by
activations of 16 bits, which gives that product but for rounding, or of 8, as a served model has them where nothing is said;
llama.cpp has 8 alone. The report says of each engine whether it left the float product, and by how much. With 8 bits no error
of an export is needed for such a gap, and yet it is one: the limit is the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from bessemer.core.errors import ArtefactError, BessemerError, ConfigError
from bessemer.core.progress import Progress
from bessemer.core.records import read_records
from bessemer.evaluation.replay_engines import LlamaCppEngine, Message, OurEngine, Runtime, TransformersEngine
from bessemer.model.cpu_kernels import library
from bessemer.model.storage.tuned_folder import tuned_model

#: Gap in logits from which a difference is a defect.
TOLERANCE = 0.1

#: Prompts of several kinds: facts, sums, code, another language, a list, a long sentence, white space.
REFERENCE_PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "What is 17 + 25? Answer with the number alone.",
    "Write a Python function that reverses a string.",
    "Translate into German: The house is on the hill.",
    "List three fruits that are yellow.",
    "Rewrite in the past tense: She walks to the market and buys bread, milk and two apples for her brother.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron? Say why in one sentence.",
    "Summarise in one sentence:\n\nThe meeting was moved to Tuesday.\n\tThe room stays the same; lunch is served at noon.",
    'Answer as JSON with the keys "name" and "age": Anna is twelve years old.',
)


class Difference(NamedTuple):
    """Where an answer leaves the reference's.

    prompt: counted from 1. position: of the token in the answer, from 1; 0: the prompts' ids differ already. tokens: the
    reference's and the other's; "end" where an answer ends. gap: in logits; None for prompts.
    """

    prompt: int
    position: int
    tokens: tuple[str, str]
    gap: float | None

    def is_defect(self, tolerance: float) -> bool:
        """Whether more than rounding parts the two."""
        return self.gap is None or not self.gap <= tolerance


@dataclass(frozen=True)
class Comparison:
    """An engine with one form of a model beside a reference.

    decides: whether a difference counts, as it does between two engines with the same numbers, and not between codes and what
    they were rounded from. rounds: whether one of the two engines rounds activations to 8 bits.
    """

    thing: str
    engine: str
    reference: str
    prompts: int
    differences: tuple[Difference, ...]
    decides: bool = True
    rounds: bool = False

    def defects(self, tolerance: float) -> list[Difference]:
        """The differences that are not rounding."""
        return [one for one in self.differences if self.decides and one.is_defect(tolerance)]


class Thing(NamedTuple):
    """A form of the model. adapter: a LoRA-GGUF beside the file of its base. is_coded: its weights are codes."""

    name: str
    place: Path
    adapter: Path | None = None
    is_coded: bool = False


def find_thing(name: str, find: Callable[[str], Path]) -> Thing:
    """A form by its name: what a model is called elsewhere, or BASE.gguf+LORA.gguf. find: the place of a model's name.

    Raises ArtefactError for one that is not there.
    """
    base, plus, adapter = name.partition(".gguf+")
    if plus:
        places = [Path(f"{base}.gguf"), Path(adapter)]
        for place in places:
            if not place.is_file():
                raise ArtefactError(f"{name}: {place}: no such file")
        return Thing(name, places[0], places[1], _is_coded(places[0]))
    place = find(name)
    return Thing(name, place, None, _is_coded(place))


def _is_coded(place: Path) -> bool:
    """Whether a model's weights are codes, of which an answer may differ from that of the model they were made from."""
    from bessemer.model.storage.model_config import holds_codes
    from bessemer.tokenization.formats.gguf_metadata import read_head

    if place.is_file():
        # 0, 1 and 30 are plain numbers
        return any(info.type not in (0, 1, 30) for info in read_head(place)[1])
    tuned = tuned_model(place)
    return holds_codes(place if tuned is None else tuned.folder)


def engines_of(thing: Thing, notes: list[str], activation_bits: Literal[8, 16] = 16) -> list[Callable[[], Runtime]]:
    """What opens the engines that take a form: ours first, or of codes `transformers`, which does not round activations.

    notes: gets a line for each that is not installed. activation_bits: those of our engine, where weights are codes.
    """
    openers: list[Callable[[], Runtime]] = []
    if thing.adapter is None:
        if thing.is_coded and activation_bits == 16 and library() is not None:
            notes.append("bessemer multiplies codes by activations of 16 bits here; a served one has 8 where nothing is said")
        openers.append(lambda: OurEngine(thing.place, is_coded=thing.is_coded, activation_bits=activation_bits))
        if find_spec("transformers") is not None:
            openers.insert(0 if thing.is_coded else 1, lambda: TransformersEngine(thing.place))
        else:
            notes.append("transformers is not installed: it is not compared")
    if thing.place.suffix == ".gguf":
        if find_spec("llama_cpp") is not None:
            openers.append(lambda: LlamaCppEngine(thing.place, thing.adapter, is_coded=thing.is_coded))
        else:
            notes.append("llama.cpp is not compared: pip install llama-cpp-python")
    return openers


class _Answered(NamedTuple):
    """What an engine did with the prompts."""

    engine: str
    prompts: list[list[int]]
    answers: list[list[int]]
    rounds: bool


def replay(
    things: Sequence[Thing],
    prompts: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    progress: Progress,
    notes: list[str] | None = None,
    activation_bits: Literal[8, 16] = 16,
) -> list[Comparison]:
    """Compare forms of one model: each engine with the first that opens the form, and forms of plain numbers with the first.

    Codes are compared with the first form too, without a verdict: rounding to codes changes a model. notes: gets lines on what
    is not compared. activation_bits: as in `engines_of`. One model is in memory at a time, two where their answers differ.
    """
    notes = [] if notes is None else notes
    comparisons: list[Comparison] = []
    first: tuple[Thing, Callable[[], Runtime], _Answered] | None = None
    for thing in things:
        openers = engines_of(thing, notes, activation_bits)
        if not openers:
            raise ConfigError(f"{thing.name}: no engine that opens it is installed: pip install llama-cpp-python")
        own: tuple[Callable[[], Runtime], _Answered] | None = None
        for opener in openers:
            try:
                runtime = opener()
            except BessemerError:
                raise
            # an engine that cannot open a form says so in errors of its own kind
            except Exception as error:
                notes.append(
                    f"{thing.name}: not opened by an engine: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
                )
                continue
            answered = _answers(runtime, prompts, max_tokens, f"{thing.name} by {runtime.name}", progress)
            reference = (thing, *own) if own is not None else first
            if reference is not None:
                other_thing, reopen, before = reference
                differences = _differences(before, answered, reopen, runtime)
                name = f"{before.engine} on {other_thing.name}"
                decides = own is not None or thing.is_coded == other_thing.is_coded
                rounds = before.rounds or answered.rounds
                comparisons.append(Comparison(thing.name, runtime.name, name, len(prompts), differences, decides, rounds))
            if own is None:
                own = (opener, answered)
                first = first or (thing, opener, answered)
            del runtime
            gc.collect()
        if own is None:
            raise ConfigError(f"{thing.name}: no installed engine opens it: {notes[-1]}")
    return comparisons


def _answers(
    runtime: Runtime, prompts: Sequence[Sequence[Message]], max_tokens: int, what: str, progress: Progress
) -> _Answered:
    encoded = [runtime.encode(messages) for messages in prompts]
    answers = []
    with progress.task(what, total=len(prompts), unit="prompts") as task:
        for prompt in encoded:
            answers.append(runtime.answer(prompt, max_tokens))
            task.advance()
    return _Answered(runtime.name, encoded, answers, runtime.rounds)


def _differences(
    before: _Answered, after: _Answered, reopen: Callable[[], Runtime], runtime: Runtime
) -> tuple[Difference, ...]:
    """The first difference of each answer. The reference is opened again for its logits, where there is one."""
    found: list[Difference] = []
    reference: Runtime | None = None
    for number, (ours, theirs) in enumerate(zip(before.prompts, after.prompts, strict=True), 1):
        if ours != theirs:
            place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            place = min(len(ours), len(theirs)) if place is None else place
            shown = tuple(runtime.text(ids[place]) if place < len(ids) else "end" for ids in (ours, theirs))
            found.append(Difference(number, 0, (shown[0], shown[1]), None))
            continue
        first, second = before.answers[number - 1], after.answers[number - 1]
        if first == second:
            continue
        place = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
        place = min(len(first), len(second)) if place is None else place
        reference = reference or reopen()
        prefix = [*ours, *first[:place]]
        tokens = [answer[place] if place < len(answer) else None for answer in (first, second)]
        gap, shown_pair = _gap(reference, runtime, prefix, tokens)
        found.append(Difference(number, place + 1, shown_pair, gap))
    return tuple(found)


def _gap(
    reference: Runtime, runtime: Runtime, prefix: Sequence[int], tokens: Sequence[int | None]
) -> tuple[float, tuple[str, str]]:
    """The larger of the two engines' gaps between the tokens, each from the token that it chose, and both tokens readable.

    None is the end of an answer: the end token that is likeliest.
    """
    candidates = [list(reference.ends) or list(runtime.ends) if token is None else [token] for token in tokens]
    gaps = []
    for engine, chosen in ((reference, 0), (runtime, 1)):
        scores = engine.scores(prefix, [*candidates[0], *candidates[1]])
        best = [max(scores[: len(candidates[0])]), max(scores[len(candidates[0]) :])]
        gaps.append(best[chosen] - best[1 - chosen])
    texts = ["end" if token is None else reference.text(token) for token in tokens]
    return max(gaps), (texts[0], texts[1])


def replay_lines(comparisons: Sequence[Comparison], tolerance: float, notes: Sequence[str] = ()) -> list[str]:
    """The report: a line for each comparison, and one for each answer that differs."""
    lines = [f"note: {note}" for note in dict.fromkeys(notes)]
    for one in comparisons:
        equal = one.prompts - len(one.differences)
        verdict = "" if one.decides else "; codes beside the numbers that they were made of: no verdict"
        verdict = "; activations are rounded to 8 bits" + verdict if one.rounds else verdict
        lines.append(f"{one.thing} by {one.engine}, beside {one.reference}: {equal} of {one.prompts} answers equal{verdict}")
        for found in one.differences:
            first, second = found.tokens
            if found.gap is None:
                lines.append(f"  prompt {found.prompt}: the prompts' tokens differ: {first} there, {second} here; a defect")
                continue
            if not found.is_defect(tolerance):
                what = "rounding"
            elif not one.decides:
                what = "other numbers"
            else:
                what = f"a defect; {one.engine} rounds activations" if one.rounds else "a defect"
            lines.append(
                f"  prompt {found.prompt}: token {found.position} is {first} there, {second} here; their logits are "
                f"{found.gap:.3f} apart: {what}"
            )
    defects = sum(len(one.defects(tolerance)) for one in comparisons)
    if not comparisons:
        lines.append("one form in one engine: nothing to compare it with")
    elif defects:
        lines.append(
            f"{defects} {'difference is' if defects == 1 else 'differences are'} more than rounding (a gap above {tolerance:g})"
        )
    else:
        lines.append(f"all equal but for rounding (gaps of at most {tolerance:g})")
    return lines


def read_prompts(path: Path | None) -> list[list[Message]]:
    """The prompts of a JSON-lines file, each with `messages` or `prompt`; the reference prompts where none is named.

    Raises ArtefactError for a line that has neither.
    """
    if path is None:
        return [[{"role": "user", "content": prompt}] for prompt in REFERENCE_PROMPTS]
    prompts: list[list[Message]] = []
    for record in read_records(path):
        messages, prompt = record.values.get("messages"), record.values.get("prompt")
        if isinstance(messages, list) and messages:
            while messages and messages[-1].get("role") == "assistant":
                messages = messages[:-1]
            prompts.append(messages)
        elif isinstance(prompt, str):
            prompts.append([{"role": "user", "content": prompt}])
        else:
            raise ArtefactError(f"{record.place}: needs prompt (a text) or messages (a list)")
    if not prompts:
        raise ArtefactError(f"{path}: holds no prompts")
    return prompts
