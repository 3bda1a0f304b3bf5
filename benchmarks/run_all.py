"""Runs the benchmarks one after the other, whatever one of them does, and says in the end how each ended.

    python benchmarks/run_all.py               # `make bench`: speed beside peers, about an hour on two cores
    python benchmarks/run_all.py --studies     # `make studies`: what training and compression come to, some hours
    python benchmarks/run_all.py inference data/filters      # some of them

A benchmark that lacks its device or its peer is one line, `not run: …`. Results lie in `benchmarks/results/`, one file each;
`python benchmarks/tables.py` writes them into README and docs. Exit code 1 when a benchmark failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import recording
from bessemer.core.metrics import duration

HERE = Path(__file__).parent


class Benchmark(NamedTuple):
    """A script beside this one, and its arguments."""

    script: str
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called on the command line: `inference`, `data/filters`."""
        return "/".join([self.script, *self.arguments])


BENCH = [
    Benchmark("quickstart"),
    Benchmark("inference"),
    Benchmark("inference", ("--model", "1b")),
    Benchmark("capture"),
    Benchmark("evaluation"),
    Benchmark("evaluation_agreement"),
    Benchmark("servers"),
    Benchmark("first_minute"),
    Benchmark("first_answer"),
    Benchmark("web"),
    Benchmark("matrices"),
    Benchmark("packed_products"),
    Benchmark("gguf_forms"),
    Benchmark("pretraining"),
    Benchmark("posttraining"),
    Benchmark("finetune"),
    Benchmark("finetune_pass"),
    Benchmark("loader"),
    Benchmark("sandbox"),
    Benchmark("agent_injections"),
    Benchmark("function_calls"),
    Benchmark("tokenization"),
    Benchmark("data", ("filters",)),
    Benchmark("data", ("minhash",)),
    Benchmark("data", ("refinery",)),
    Benchmark("deduplication", ("planted",)),
    Benchmark("edits"),
    Benchmark("extraction"),
    Benchmark("labels"),
    Benchmark("languages"),
    Benchmark("llama_cpp_models"),
    Benchmark("llama_cpp_tokenizers"),
    Benchmark("jax_forward"),
    Benchmark("inspection"),
    Benchmark("vocabularies"),
    Benchmark("engine_gpu"),
    Benchmark("pretraining_gpu"),
]
STUDIES = [
    Benchmark("inference", ("--model", "3b")),
    Benchmark("inference", ("--model", "8b")),
    Benchmark("speculation"),
    Benchmark("architectures"),
    Benchmark("optimizers"),
    Benchmark("quantisation"),
    Benchmark("merging"),
    Benchmark("retrieval"),
    Benchmark("refined"),
    Benchmark("long_context"),
    Benchmark("distillation"),
    Benchmark("reasoning"),
    Benchmark("width_transfer"),
    Benchmark("scaling_ladder", ("predict",)),
    Benchmark("scaling_ladder", ("target",)),
    Benchmark("scaling_ladder", ("rates",)),
    Benchmark("sums"),
    Benchmark("tool_agents"),
    Benchmark("rollout_servers"),
    Benchmark("tinker_recipes"),
    Benchmark("overoptimisation"),
    Benchmark("tone"),
    Benchmark("tone", ("--harmless",)),
    Benchmark("constitution"),
    Benchmark("deduplication", ("scaling",)),
    Benchmark("refinery_memory"),
    Benchmark("adapter_memory"),
    Benchmark("sampler_gap"),
    Benchmark("replay_gaps"),
    Benchmark("shard_loading"),
    Benchmark("deduplication", ("memory",)),
    Benchmark("personal_adapters"),
]


def run(benchmark: Benchmark) -> str:
    """Run one, its output passed through; how it ended, in a few words."""
    print(f"== {benchmark.name}", flush=True)
    command = [sys.executable, str(HERE / f"{benchmark.script}.py"), *benchmark.arguments]
    start, last = time.monotonic(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode == recording.NOT_RUN:
        return last
    took = duration(time.monotonic() - start)
    return f"ran in {took}" if process.returncode == 0 else f"failed after {took} with exit code {process.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--studies", action="store_true", help="the studies instead")
    arguments = parser.parse_args()
    known = {benchmark.name: benchmark for benchmark in [*BENCH, *STUDIES]}
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in arguments.names] or (STUDIES if arguments.studies else BENCH)
    ended = {benchmark.name: run(benchmark) for benchmark in chosen}
    print("==")
    for name, how in ended.items():
        print(f"{name:<24} {how}")
    sys.exit(any(how.startswith("failed") for how in ended.values()))


if __name__ == "__main__":
    main()
