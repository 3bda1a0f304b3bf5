"""What the planner says of published training runs and of the larger recipes. Computes formulas alone; needs no GPU.

    python benchmarks/planning.py

`published`: seconds of a step as the makers of a run give them, and as predicted (`scaling/published.py`). `recipes`: layout,
memory, time and cost of the shipped recipes, as they are, on the cards that they are meant for; prices are the planner's
assumptions. Nothing is measured, so there is no file of a result: `tables.py` computes these tables when it writes the pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import recording
from bessemer.core.metrics import duration, short_count, size
from bessemer.pipeline.planning import training_plan
from bessemer.scaling.hardware import find_card
from bessemer.scaling.job import PlannedJob
from bessemer.scaling.planner import Plan, configured_plan, describe
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


def predicted(recipe: str, gpus: int, card: str) -> tuple[Plan, int]:
    """The plan of a recipe's own layout on its cards, and its number of tokens."""
    asked = training_plan(recipe)
    assert asked.tokens is not None
    return configured_plan(PlannedJob(asked.model, asked.settings, find_card(card)), gpus), asked.tokens


def time_of(days: float) -> str:
    return duration(86_400 * days) if days < 2 else f"{days:.0f} days"


def recipe_row(name: str) -> list[Any]:
    """A row of the table `recipes`."""
    gpus, card, shown = RECIPES[name]
    plan, tokens = predicted(name, gpus, card)
    return [
        f"`{name}`",
        f"{gpus:,} × {shown}",
        describe(plan),
        f"{size(plan.memory.peak)} of {size(plan.job.card.usable_memory)}",
        short_count(plan.job.model.parameters()),
        short_count(tokens),
        time_of(plan.days(tokens)),
        plan.dollars(tokens, plan.job.card.price),
    ]


def published_row(row: Mapping[str, Any]) -> list[Any]:
    """A row of the table `published`. row: of `compared`, and whether the run is in float8."""
    # of float8 runs the utilisation would be a share of bfloat16's peak
    shares = [None, None] if row["float8"] else [row["utilisation"], row["predicted_utilisation"]]
    return [row["run"], row["seconds"], row["predicted"], row["error"], *shares]


_PUBLISHED_COLUMNS = [
    ("run", ""),
    ("seconds of a step, published", ".2f"),
    ("predicted", ".2f"),
    ("error", "+.0%"),
    ("MFU, published", ".0%"),
    ("predicted", ".0%"),
]
_RECIPE_COLUMNS = [
    ("recipe", ""),
    ("cards", ""),
    ("layout of the recipe", ""),
    ("memory of a card", ""),
    ("parameters", ""),
    ("tokens", ""),
    ("predicted time", ""),
    ("dollars", ",.0f"),
]


def computed() -> dict[str, Any]:
    """Figures and tables, in the form of a result that has no machine and no day."""
    published = [compared(run) | {"float8": run.settings.get("float8", False)} for run in RUNS]
    return {
        "command": "python benchmarks/planning.py",
        "figures": {"largest_error": max(abs(row["error"]) for row in published)},
        "tables": {
            "published": recording.table(_PUBLISHED_COLUMNS, map(published_row, published)),
            "recipes": recording.table(_RECIPE_COLUMNS, map(recipe_row, RECIPES)),
        },
    }


def main() -> None:
    for table in computed()["tables"].values():
        for row in table["rows"]:
            print("  ".join(str(cell) for cell in row))


if __name__ == "__main__":
    main()
