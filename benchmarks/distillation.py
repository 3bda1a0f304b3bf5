"""What distillation is worth on small models: bits per byte on text, and the divergence from the teacher on the student's own
answers.

    python benchmarks/distillation.py [--out FOLDER] [--threads N]

The models of `examples/distillation`: a teacher, and a smaller student that was trained for a while, on the documentation of
the standard library. Two questions, at equal steps, batches and schedules:

- *Text.* The student goes on with the teacher's distribution of every token, and with the next tokens alone. Which share of the
  gap in bits per byte between student and teacher does each close?
- *Answers.* Prompts are beginnings of documents. The student learns from answers of the teacher, sampled once; or from its own,
  by the whole reverse divergence and by the policy gradient of the log-ratio, in half the updates; the latter, which is far
  noisier, also with sixteen times as many answers an update. How far from the teacher is it on its own answers to held-out
  prompts? Every way at the best of some learning rates.

About five minutes on two quiet cores. What is finished in the folder is not done again. Result: `distillation.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bessemer.pipeline.api
import recording
from bessemer.core.metrics import read_metrics
from bessemer.core.progress import PlainLines
from bessemer.core.store import read_json, write_json
from bessemer.posttraining.distillation.config import DistillationConfig
from bessemer.posttraining.distillation.stage import distill
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.pretrain import pretrain
from bessemer.training.pretrain_config import PretrainConfig

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/posttraining/distillation", "src/bessemer/training", "src/bessemer/model", "src/bessemer/inference")

RECIPE = Path(__file__).parents[1] / "examples" / "distillation" / "recipe.yaml"
SEED = 11
STEPS = 150
TEXT = {
    "steps": STEPS,
    "batch_size": 8,
    "context_length": 128,
    "optimizer": "muon",
    "learning_rate": 5e-3,
    "weight_decay": 0.1,
    "warmup_fraction": 0.05,
    "decay_fraction": 0.5,
    "dtype": "float32",
    "compile": False,
    "diagnostics_every": 0,
}
#: Tokens of a prompt, prompts, and those of them that are held out, roughly.
PROMPT_TOKENS, PROMPTS, HELD_OUT = 12, 400, 0.2
UPDATES, ANSWERS, ANSWER_TOKENS = 40, 32, 32
RATES = (5e-3, 1e-2, 2e-2)
#: One answer a row, so that an update learns from as many whichever way it goes.
PROMPTED = {
    "batch_size": ANSWERS,
    "max_tokens": ANSWER_TOKENS,
    "context_length": PROMPT_TOKENS + ANSWER_TOKENS + 4,
    "optimizer": "muon",
    "warmup_fraction": 0.1,
    "validation_share": HELD_OUT,
    "validation_limit": 64,
    "evaluate_every": 5,
    "dtype": "float32",
    "compile": False,
    "diagnostics_every": 0,
}
#: By key: a name, settings, the share of the updates, the answers of one, and learning rates.
WAYS: Mapping[str, tuple[str, dict[str, Any], float, int, tuple[float, ...]]] = {
    "teacher": (
        "teacher's answers, cross-entropy",
        {"answers": "teacher", "loss": "cross_entropy", "samples_per_prompt": 4},
        1.0,
        ANSWERS,
        RATES,
    ),
    "reverse_kl": ("own answers, `reverse_kl`", {"answers": "student", "loss": "reverse_kl"}, 0.5, ANSWERS, RATES),
    "policy_gradient": (
        "own answers, `policy_gradient`",
        {"answers": "student", "loss": "policy_gradient"},
        0.5,
        ANSWERS,
        (2e-3, 5e-3),
    ),
    "policy_gradient_more": (
        "own answers, `policy_gradient`",
        {"answers": "student", "loss": "policy_gradient"},
        0.5,
        16 * ANSWERS,
        (1e-2, 2e-2),
    ),
}


def finished(folder: Path, make: Any) -> dict[str, Any]:
    """What a run came to, made unless the folder has it already."""
    if not (folder / "result.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        result = make(folder)
        write_json(folder / "result.json", {**result, "whole_seconds": round(time.perf_counter() - start, 1)})
    return dict(read_json(folder / "result.json"))


def on_text(student: Path, teacher: Path, tokens: Path, out: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Bits per byte of the student before, of the teacher, and of the student after each way."""
    found: dict[str, Any] = {}
    plain = finished(
        out / "next_token",
        lambda folder: pretrain(PretrainConfig.parse({**TEXT, **machine}), student, tokens, folder, seed=SEED, device="cpu"),
    )
    found["next_token"] = plain["bits_per_byte"]
    for loss in ("forward_kl", "top_k"):
        config = DistillationConfig.parse({**TEXT, **machine, "loss": loss})
        result = finished(
            out / loss,
            lambda folder, config=config: distill(config, student, teacher, folder, tokens=tokens, seed=SEED, device="cpu"),
        )
        found[loss], found["teacher"] = result["bits_per_byte"], result["teacher_bits_per_byte"]
        print(f"text, {loss}: {result['bits_per_byte']:.4f} bits per byte", flush=True)
    return found


def write_prompts(tokens: Path, tokenizer_folder: Path, path: Path) -> None:
    """Beginnings of documents, each once."""
    shards, tokenizer = TokenShards(tokens / "train"), load_tokenizer(tokenizer_folder)
    starts, start = {}, 0
    for length in shards.documents()["length"].to_pylist():
        if length > PROMPT_TOKENS + ANSWER_TOKENS and len(starts) < PROMPTS:
            # behind the begin token
            starts[tokenizer.decode(shards.read(start + 1, PROMPT_TOKENS - 1).tolist())] = None
        start += length
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in starts if text.strip()), encoding="utf-8")


def on_answers(student: Path, teacher: Path, prompts: Path, out: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """By way: the learning rates that were tried with the divergence at the end, and the best one's curve."""
    found: dict[str, Any] = {}
    for key, (name, settings, share, answers, rates) in WAYS.items():
        by_rate: dict[str, float] = {}
        curves: dict[str, list[list[float]]] = {}
        for rate in rates:
            length = {"steps": round(share * UPDATES), "learning_rate": rate, "batch_size": answers}
            config = DistillationConfig.parse({**PROMPTED, **settings, **length, **machine, "data": [str(prompts)]})
            folder = out / f"{key}-{rate:g}"
            result = finished(
                folder, lambda folder, config=config: distill(config, student, teacher, folder, seed=SEED, device="cpu")
            )
            by_rate[f"{rate:g}"] = result["validation_reverse_kl"]
            curves[f"{rate:g}"] = [
                [line["step"], line["validation_reverse_kl"]]
                for line in read_metrics(folder / "metrics.jsonl")
                if "validation_reverse_kl" in line
            ]
            print(
                f"answers, {key}, rate {rate:g}: {result['validation_reverse_kl']:.4f} nats after {result['steps']} updates, "
                f"{result['whole_seconds']:.0f} s",
                flush=True,
            )
        best = min(by_rate, key=by_rate.__getitem__)
        found[key] = {"name": name, "updates": curves[best][-1][0], "answers": answers, "rate": float(best), "by_rate": by_rate}
        found[key] |= {"reverse_kl": by_rate[best], "curve": curves[best]}
    target = found["teacher"]["reverse_kl"]
    for one in found.values():
        one["reaches_at"] = next((step for step, value in one["curve"] if value <= target), None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"), help="folder of the runs")
    parser.add_argument("--threads", type=int, help="of the processor; absent: every core")
    arguments = parser.parse_args()
    out: Path = arguments.out
    machine = {} if arguments.threads is None else {"threads": arguments.threads}
    overrides = {f"{stage}.{name}": value for stage in ("teacher", "student") for name, value in machine.items()}
    made = bessemer.pipeline.api.run(
        str(RECIPE), overrides, name="models", runs=out / "runs", until="student", progress=PlainLines(interval=30)
    )
    stages = made.folder / "stages"
    teacher, student = (stages / name / "model" for name in ("teacher", "student"))
    before = next(one.artefact.manifest["metrics"]["bits_per_byte"] for one in made.made if one.stage.name == "student")
    text = {"student": before, **on_text(student, teacher, made.folder / "tokens", out / "text", machine)}
    gap = text["student"] - text["teacher"]
    closed = {name: (text["student"] - text[name]) / gap for name in ("next_token", "forward_kl", "top_k")}
    prompts = out / "prompts.jsonl"
    write_prompts(made.folder / "tokens", student, prompts)
    answers = on_answers(student, teacher, prompts, out / "answers", machine)
    figures = {
        "text": {"steps": STEPS, "bits_per_byte": text, "gap_closed": closed},
        "answers": {"updates": UPDATES, "answer_tokens": ANSWER_TOKENS, "ways": answers},
    }
    titles = {
        "student": "student before",
        "next_token": f"{STEPS} steps on next tokens alone",
        "forward_kl": f"{STEPS} steps of `forward_kl`",
        "top_k": f"{STEPS} steps of `top_k`, k 64",
        "teacher": "teacher",
    }
    tables = {
        "text": recording.table(
            [("", ""), ("bits per byte", ".3f"), ("of the gap closed", ".0%")],
            [(title, text[name], closed.get(name)) for name, title in titles.items()],
        ),
        "answers": recording.table(
            [
                ("learnt from", ""),
                ("updates", ",d"),
                ("answers of each", ",d"),
                ("learning rate", "g"),
                ("KL(student ‖ teacher) on own held-out answers, nats per token", ".3f"),
                ("the first row's figure reached at update", ",d"),
            ],
            [
                (one["name"], one["updates"], one["answers"], one["rate"], one["reverse_kl"], one["reaches_at"])
                for one in answers.values()
            ],
        ),
    }
    print(json.dumps(figures), flush=True)
    recording.save("distillation", figures, tables=tables, peers=["torch"])


if __name__ == "__main__":
    main()
