"""What the planner says of published training runs and of the larger recipes. Computes formulas alone; needs no GPU.

    python benchmarks/planning.py

`published`: seconds of a step as the makers of a run give them, and as predicted (`scaling/published.py`). `recipes`: time and
cost of the shipped recipes on the cards that they are meant for, with the best layout of the search; prices are the planner's
assumptions. Result: `planning.json`.
"""

from __future__ import annotations

from typing import Any

import recording
from bessemer.core.figures import duration, short_count
from bessemer.pipeline.planning import planned
from bessemer.scaling.hardware import find_card
from bessemer.scaling.job import TrainingJob
from bessemer.scaling.planner import plan_summary, plans
from bessemer.scaling.published import RUNS, compared

#: Recipes, how many cards of which kind each is for, and the card's name in the table.
RECIPES = {
    "125m": (1, "h100", "H100"),
    "moe": (1, "h100", "H100"),
    "one-card": (1, "rtx4090", "RTX 4090"),
    "1b": (8, "h100", "H100"),
    "gpt2-core": (8, "h100", "H100"),
    "70b": (512, "h100", "H100"),
    "gpt3-175b": (1024, "a100", "A100"),
    "moe-1t": (1024, "h200", "H200"),
}


def predicted(recipe: str, gpus: int, card: str) -> dict[str, Any]:
    """Size, tokens, days and dollars of a recipe under the best layout."""
    asked, kind = planned(recipe), find_card(card)
    found = plan_summary(
        plans(TrainingJob(asked.model, asked.settings, kind), gpus, count=1), tokens=asked.tokens, price=kind.price
    )
    best = found["plans"][0]
    return {key: found[key] for key in ("gpus", "card", "parameters", "active_parameters", "tokens", "price_per_gpu_hour")} | {
        key: best[key] for key in ("described", "days", "dollars", "tokens_per_second", "model_flops_utilisation")
    }


def time_of(days: float) -> str:
    return duration(86_400 * days) if days < 2 else f"{days:.0f} days"


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    published = [
        (
            row["run"],
            row["seconds"],
            row["predicted"],
            row["error"],
            # of float8 runs it would be a share of bfloat16's peak
            *((None, None) if row["float8"] else (row["utilisation"], row["predicted_utilisation"])),
        )
        for row in figures["published"]
    ]
    recipes = [
        (
            f"`{name}`",
            f"{found['gpus']:,} × {RECIPES[name][2]}",
            short_count(found["parameters"]),
            short_count(found["tokens"]),
            time_of(found["days"]),
            found["dollars"],
        )
        for name, found in figures["recipes"].items()
    ]
    return {
        "published": recording.table(
            [
                ("run", ""),
                ("seconds of a step, published", ".2f"),
                ("predicted", ".2f"),
                ("error", "+.0%"),
                ("MFU, published", ".0%"),
                ("predicted", ".0%"),
            ],
            published,
        ),
        "recipes": recording.table(
            [
                ("recipe", ""),
                ("cards", ""),
                ("parameters", ""),
                ("tokens", ""),
                ("predicted time", ""),
                ("dollars", ",.0f"),
            ],
            recipes,
        ),
    }


def main() -> None:
    figures: dict[str, Any] = {
        "published": [compared(run) | {"float8": run.settings.get("float8", False)} for run in RUNS],
        "recipes": {name: predicted(name, gpus, card) for name, (gpus, card, _) in RECIPES.items()},
    }
    errors = [abs(row["error"]) for row in figures["published"]]
    figures["largest_error"] = max(errors)
    for row in figures["published"]:
        print(f"{row['run']:50}{row['seconds']:8.2f} s{row['predicted']:8.2f} s{row['error']:+8.0%}")
    for name, found in figures["recipes"].items():
        print(f"{name:12}{found['gpus']:>6} × {found['card']:10}{time_of(found['days']):>14}{found['dollars']:>14,.0f} dollars")
    print(recording.save("planning", figures, tables=tables(figures)))


if __name__ == "__main__":
    main()
