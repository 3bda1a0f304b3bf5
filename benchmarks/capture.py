"""What a request that captures costs the others: steps of eight requests, one of which captures, beside steps without.

    python benchmarks/capture.py

SmolLM2-135M-Instruct in Q8_0, two threads, greedy, in one process; the kinds of capture in turn, many rounds. A figure is the
lower quartile of the rounds' median step: other load only ever adds. Result: `capture.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import inference
import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.inference.engine import Capture, Engine, EngineConfig, SamplingParams  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/inference", "src/bessemer/model")

REQUESTS, PROMPT, TOKENS = 8, 32, 64
LAYERS = 30
KINDS = {
    "nothing": None,
    "states of one layer": Capture(states=(LAYERS,)),
    "states of all layers": Capture(states=tuple(range(LAYERS + 1))),
    "attention of one head": Capture(attention=((10, 0),)),
    "states of all layers, attention of three heads": Capture(
        states=tuple(range(LAYERS + 1)), attention=((5, 0), (10, 1), (20, 2))
    ),
}


def median_step(engine: Engine, capture: Capture | None) -> float:
    """Milliseconds of a step in which every request makes a token."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    prompts = [[(7 * request + place) % 4000 + 10 for place in range(PROMPT)] for request in range(REQUESTS)]
    requests = [engine.prepare(prompt, params, capture=None if number else capture) for number, prompt in enumerate(prompts)]
    for request in requests:
        engine.begin(request)
    while not all(request.token_ids for request in requests):
        engine.step()
    seconds = []
    while not all(request.done for request in requests):
        begun = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--work", type=Path, default=inference.WORK, help="models are kept here")
    arguments = parser.parse_args()
    config = EngineConfig(threads=2, prefix_cache=False)
    engine = Engine(inference.gguf_file(arguments.work, "Q8_0"), config=config)
    median_step(engine, None)
    rounds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind, capture in KINDS.items():
            rounds[kind].append(median_step(engine, capture))
    quartiles = {kind: statistics.quantiles(times, n=4)[0] for kind, times in rounds.items()}
    rows = [[kind, milliseconds, milliseconds / quartiles["nothing"] - 1] for kind, milliseconds in quartiles.items()]
    figures = {"milliseconds": quartiles, "rounds": rounds}
    table = recording.table([("one of eight requests captures", ""), ("ms a step", ".2f"), ("more", ".1%")], rows)
    print(recording.save("capture", figures, tables={"cost": table}))


if __name__ == "__main__":
    main()
