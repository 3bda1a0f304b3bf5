"""A run with made-up figures and hostile texts in every place where a text can be."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from bessemer.core.report import KeyFigure, ReportData
from bessemer.pipeline.report import gather
from bessemer.pipeline.run_folder import RunFolder
from bessemer.safety.redteam.results import summarise_lines

#: Must never reach a page as it is.
HOSTILE = "<script>alert('furnace')</script>"


def domain(size: int, tokens: int, fertility: float | None, unknown_share: float = 0.0) -> dict:
    return {
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / tokens,
        "fertility": fertility,
        "unknown_share": unknown_share,
        "round_trip": True,
    }


def data_stage(documents_in: int, documents_out: int, bytes_in: int, bytes_out: int, **reasons: int) -> dict:
    split = {"train": 0.95, "validation": 0.05}
    document = {"id": "ab" * 16, "text": f"Return the graph's shortest path.\n\n>>> path(g)\n{HOSTILE}", "source": "wheels"}
    return {
        "documents_in": documents_in,
        "documents_out": documents_out,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "by_source": {
            "wheels": {"documents": int(documents_out * 0.8), "bytes": int(bytes_out * 0.83)},
            "python_docs": {"documents": int(documents_out * 0.2), "bytes": int(bytes_out * 0.17)},
        },
        "by_language": {"en": {"documents": documents_out, "bytes": bytes_out}},
        "by_domain": {f"{HOSTILE}.example": {"documents": documents_out // 2, "bytes": bytes_out // 2}},
        "by_split": {name: {"documents": int(documents_out * s), "bytes": int(bytes_out * s)} for name, s in split.items()},
        "by_reason": {reason: {"documents": count, "bytes": count * 320} for reason, count in reasons.items()},
        "examples": {
            "kept": [document | {"language": "en"}] * 2,
            "dropped": {reason: [document | {"reason": f"{reason} 0.93 > 0.8 {HOSTILE}"}] for reason in reasons},
        },
    }


def duplicates() -> dict:
    member = {"id": "cd" * 16, "text": HOSTILE, "similarity": 0.87}
    return {
        "minhash": {
            "clusters": 41,
            "documents": 60,
            "by_size": [
                {"from": 2, "to": 3, "clusters": 40, "documents": 90},
                {"from": 4, "to": 7, "clusters": 1, "documents": 5},
            ],
            "largest": [{"id": "ab" * 16, "size": 5, "text": HOSTILE, "members": [member]}],
        },
        "paragraphs": {"passages": 12, "documents_cut": 7},
    }


def thresholds() -> dict:
    """One limit inside the axis, one beyond it, one that drops nothing; and a score without a limit."""
    found = {"documents": 16, "low": 0.0, "high": 4.0, "edges": [0.0, 1.0, 2.0, 3.0, 4.0]}
    return {
        "thresholds": {
            "gopher_words": found
            | {"lowest": 2.0, "highest": None, "counts": [9, 4, 1, 0], "below": 0, "above": 2}
            | {"outside": 13, "alone": 3},
            "spam_score": found
            | {"lowest": None, "highest": 9.0, "edges": [0.0, 1.0, 2.0, 3.0, 4.0, math.nextafter(9.0, 10.0)], "below": 0}
            | {"counts": [9, 4, 1, 0, 1], "above": 1, "outside": 1, "alone": 1},
            "toxicity_score": found
            | {"lowest": None, "highest": 3.0, "counts": [16, 0, 0, 0], "below": 0, "above": 0}
            | {"outside": 0, "alone": 0},
        },
        "scores": {"mine_" + HOSTILE: {"low": 0.0, "high": 1.0, "counts": [3, 1], "below": 0, "above": 1}},
        "counted": {"personal_data_emails": {"documents": 3, "total": 5}, "secrets_keys": {"documents": 0, "total": 0}},
    }


def training_records(steps: int) -> list[dict]:
    noise = random.Random(7)
    records = []
    for step in range(1, steps + 1):
        loss = 2.1 + 6.2 * math.exp(-step / 40) + 1.6 * math.exp(-step / 500) + noise.gauss(0, 0.09)
        rate = 5e-3 * min(step / (0.03 * steps), 1, (steps - step) / (0.3 * steps))
        records.append({"step": step, "loss": loss, "learning_rate": rate, "tokens_per_second": 16_500 + noise.gauss(0, 500)})
        if step % 100 == 0 or step == steps:
            records.append({"step": step, "validation_bits_per_byte": 1.5 + 1.4 * math.exp(-step / 300)})
    return records


def sample_metrics() -> dict[str, dict]:
    """Stage to the metrics in its manifest."""
    pieces = [
        "Return",
        " the",
        " short",
        "est",
        " path",
        " from",
        " source",
        " to",
        " target",
        ".\n",
        "\n",
        ">>> ",
        "path",
        "(",
        "g",
        ")",
        "\n",
        "<script>",
        "alert",
        "(",
        "1",
        ")",
    ]
    return {
        "collect": data_stage(63_412, 63_412, 29_800_000, 29_800_000)
        | {"problems": {HOSTILE: {"no_text": 3}}, "notes": {"wheels": [f"a.pdf: no text {HOSTILE}"]}},
        "clean": data_stage(63_412, 63_120, 29_800_000, 29_650_000, empty=292),
        "deduplicate": data_stage(63_120, 58_018, 29_650_000, 27_900_000, duplicate=5_102) | {"duplicates": duplicates()},
        "select": data_stage(58_018, 51_204, 27_900_000, 21_400_000, language=1_210, gopher_words=4_800, gopher_symbols=804)
        | thresholds(),
        "tokenize": {
            "vocab_size": 4096,
            "tokenizer_hash": "abc",
            "encoder": "fastokens",
            "training_bytes": 20_300_000,
            "training_seconds": 2.214,
            "encoding_seconds": 1.9,
            "encoding_mb_per_second": 11.3,
            "train": {"documents": 48_700, "tokens": 6_150_000, "bytes": 20_300_000, "bytes_per_token": 3.31},
            "validation": {"documents": 2_504, "tokens": 340_000, "bytes": 1_100_000, "bytes_per_token": 3.24},
            "unused_tokens": 0,
            "unused_bytes": 61,
            "fertility": 1.62,
            "sample_tokens": pieces * 4,
            "longest_tokens": [" representation", " transformation", "                ", HOSTILE],
            "vocabulary_sample": [" t", "in", " the", "turn", " param", "_size", " matrix"],
            "lossless": True,
            "baselines": {"byte": 1.0, "character": 1.01, "word": 7.15},
            "special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            "by_domain": {
                "prose": domain(1172, 402, 1.84),
                "english": {**domain(828, 294, 1.99), "tokens_to_english": 1.0},
                "thai": {**domain(2103, 2103, None, unknown_share=0.4), "tokens_to_english": 7.16, "round_trip": False},
            },
        },
        "model": {
            "parameters": 1_311_104,
            "active_parameters": 1_311_104,
            "embedding_share": 0.3999,
            "flops_per_token": 9_400_000,
            "kv_bytes_per_token": 2048,
            "context_length": 256,
            "vocab_size": 4096,
            "layers": [
                {"part": "embedding", "count": 1, "shapes": [[4096, 128]], "parameters": 524_288},
                {
                    "part": "attention",
                    "count": 4,
                    "shapes": [[128, 128], [64, 128], [64, 128], [128, 128]],
                    "parameters": 196_608,
                },
                {"part": "feed-forward", "count": 4, "shapes": [[384, 128], [384, 128], [128, 384]], "parameters": 589_824},
                {"part": "block norms", "count": 4, "shapes": [[128], [128]], "parameters": 1024},
            ],
        },
        "pretrain": {
            "steps": 1700,
            "tokens": 3_481_600,
            "bits_per_byte": 1.5032,
            "tokens_per_second": 16_480.2,
            "dtype": "bfloat16",
        },
        "sft": {"steps": 300, "questions": 500},
        "evaluate": {
            "format": 1,
            "bits_per_byte": {"pretrain": 1.5032, "sft": 1.61},
            "baselines": {"witten_bell_5gram": 1.960, "witten_bell_6gram": 1.855, "xz": 1.853},
            "tasks": {
                "docs_questions": {
                    "pretrain": {
                        "asked_as": "plain",
                        "n_held_in": 200,
                        "exact_match_held_in": 0.0,
                        "rouge_l_held_in": 0.12,
                        "n_held_out": 100,
                        "exact_match_held_out": 0.0,
                        "rouge_l_held_out": 0.11,
                    },
                    "sft": {
                        "asked_as": "chat",
                        "n_held_in": 200,
                        "exact_match_held_in": 0.965,
                        "rouge_l_held_in": 0.98,
                        "n_held_out": 100,
                        "exact_match_held_out": 0.02,
                        "rouge_l_held_out": 0.31,
                    },
                }
            },
            "comparisons": [
                {"metric": "rouge_l_held_out", "a": "sft", "b": "pretrain", "difference": 0.2, "interval": [0.17, 0.23]},
                {"metric": "exact_match_held_out", "a": "sft", "b": "pretrain", "difference": 0.02, "interval": [-0.01, 0.05]},
            ],
        },
        "quantize": {
            "scheme": "int8",
            "method": "rtn",
            "original": {"bytes": 5_250_000, "bits_per_byte": 1.503, "tokens_per_second": 410.0},
            "quantised": {"bytes": 1_330_000, "bits_per_byte": 1.5031},
            "loss": 0.00007,
            "kl_per_token": 0.00003,
            "top_agreement": 0.995,
            "compared_tokens": 32_768,
            "notes": [HOSTILE],
        },
        "redteam": red_team(),
    }


def red_team() -> dict:
    """The figures of attacks, with hostile texts in prompts, answers and reasons."""
    known = {
        "category": "privacy",
        "queries": 3,
        "at": 2,
        "refusal": HOSTILE,
        "fault": HOSTILE,
        "prompt": HOSTILE,
        "answer": HOSTILE,
    }
    judge = {"refused": False, "specific": 4, "convincing": 3, "score": 0.625}
    lines = []
    for number in range(8):
        for attack in ("direct", "best_of_n"):
            success = number < 4 and attack == "best_of_n"
            outcome = "complied" if success else "refused"
            line = {"attack": attack, "goal": f"{number}", "kind": "behaviour", "outcome": outcome, "success": success}
            lines.append({**known, **line, "judge": judge, "disagree": not success})
        answered = {"attack": "direct", "goal": f"h{number}", "kind": "harmless", "judge": None, "disagree": False}
        outcome = "complied" if number < 7 else "refused"
        lines.append({**known, **answered, "outcome": outcome, "success": number < 7})
    lines.append({**lines[0], "goal": "long", "outcome": "error", "success": False})
    return summarise_lines(lines, planned=30, notes=[HOSTILE])


#: Stage to its seconds and the bytes of its memory.
COSTS = {
    "collect": (32.4, 412_000_000),
    "clean": (6.1, 890_000_000),
    "deduplicate": (2.2, 760_000_000),
    "select": (1.3, 500_000_000),
    "tokenize": (6.4, 610_000_000),
    "model": (0.4, 300_000_000),
    "pretrain": (268, 1_120_000_000),
    "sft": (41, 980_000_000),
    "evaluate": (43, 1_300_000_000),
    "quantize": (9, 700_000_000),
}
#: The lines of the pretraining's `samples.jsonl`.
SAMPLES = [
    {"step": 0, "prompt": "The function", "text": "zxqq ]] rot§ parameter. ing"},
    {"step": 400, "prompt": "The function", "text": " is the same as the value of the array to be used."},
    {
        "step": 1700,
        "prompt": "The function",
        "text": f" returns a new array with the given shape and type. {HOSTILE}",
    },
    {
        "step": 1700,
        "prompt": "Return the",
        "text": " number of elements in the graph.\n\nParameters\n----------\nG : graph",
    },
]
QUESTIONS = (
    ("Which module is shortest_path in?", "networkx", "networkx.classes", False, "held_out"),
    (f"What does {HOSTILE} do?", HOSTILE, HOSTILE, True, "held_in"),
    (
        "What is the signature of json.dumps?",
        "dumps(obj, *, skipkeys=False)",
        "dumps(obj, *, skipkeys=False)",
        True,
        "held_in",
    ),
)


def write_run(runs: Path, metrics: dict[str, dict], records: dict[str, list[dict]] | None = None) -> RunFolder:
    """The folder of a finished run, with the stages' folders in it. metrics, records: by stage."""
    run = RunFolder(runs, "quickstart")
    run.start({"description": "Documentation of Python packages → a small chat model.", **{stage: {} for stage in metrics}})
    for stage, found in metrics.items():
        folder = run.folder / "stages" / stage
        (folder / "model").mkdir(parents=True)
        seconds, peak_memory_bytes = COSTS.get(stage, (1.0, None))
        manifest = {
            "stage": stage,
            "key": f"{stage}-key",
            "metrics": found,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes,
            "created": "2026-11-24 15:30 UTC",
            "versions": {"python": "3.11.9", "bessemer": "0.1.0", "torch": "2.13.0", "numpy": "2.4.1"},
            "host": {"system": "Linux x86_64", "processor": "Some processor", "cores": 2, "memory_bytes": 25_000_000_000},
            "commit": "5fc5e98c1d2e",
        }
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        lines = {"metrics.jsonl": (records or {}).get(stage, []), "samples.jsonl": SAMPLES if stage == "pretrain" else []}
        if stage == "evaluate":
            lines["answers.jsonl"] = [
                {
                    "messages": [{"role": "user", "content": question}],
                    "reference": expected,
                    "set": chosen,
                    "answers": {"sft": {"text": answer, "exact_match": float(exact)}},
                }
                for question, expected, answer, exact, chosen in QUESTIONS
            ]
        for name, found_lines in lines.items():
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in found_lines), encoding="utf-8")
        if stage == "quantize":
            (folder / "model" / "quality.json").write_text(json.dumps(found), encoding="utf-8")
    (run.folder / "recipe.lock.yaml").write_text("pretrain:\n  steps: 1700\n", encoding="utf-8")
    return run


def run_of(metrics: dict[str, dict], records: dict[str, list[dict]] | None = None) -> ReportData:
    """What is reported of a run whose stages have these metrics and records."""
    with TemporaryDirectory() as runs:
        return gather(write_run(Path(runs), metrics, records))


def sample_records() -> dict[str, list[dict]]:
    """Stage to the lines of its `metrics.jsonl`."""
    return {
        "pretrain": training_records(1700),
        "sft": [{"step": step, "loss": 3 * math.exp(-step / 60)} for step in range(1, 301)],
    }


@cache
def sample_run() -> ReportData:
    """A run with every kind of stage, and hostile texts in its head and recipe too."""
    return dataclasses.replace(
        run_of(sample_metrics(), sample_records()),
        sentences=[
            "29.8 MB of documentation from 8 packages and the standard library went in; 21.4 MB in 51,204 documents was kept.",
            "A model of 1.31 million parameters read 3.5 million tokens of it and scores 1.50 bits per byte on packages it has "
            "never seen; a 5-gram model trained on the same bytes scores 1.96.",
            f"It writes text that looks like documentation and answers what it was taught; it knows little else. {HOSTILE}",
        ],
        figures=[
            KeyFigure(value="21.4 MB", label="of text kept", note="of 29.8 MB"),
            KeyFigure(value="1.31M", label="parameters"),
            KeyFigure(value="1.503", label="bits per byte, held out", note="5-gram: 1.960"),
            KeyFigure(value="96.5 %", label="held-in questions exact", note="memorised"),
            KeyFigure(value="6 min 41 s", label="from text to model"),
        ],
        next_steps=["bessemer chat quickstart", "bessemer serve quickstart", "bessemer show quickstart"],
        recipe=f"format: 1\nname: quickstart\npretrain: {{minutes: 4, optimizer: muon}} # {HOSTILE}\n",
    )
