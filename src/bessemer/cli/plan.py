"""`bessemer plan`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file, or a preset of the model.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE, as in pretrain.batch_size=256.")] = None,
    gpus: Annotated[int, typer.Option(help="Number of cards.", min=1)] = 1,
    gpu: Annotated[str, typer.Option(help="Kind of card: h100, h200, b200, a100, rtx4090, cpu, …")] = "h100",
    price: Annotated[
        float | None, typer.Option(help="Dollars an hour of one card; left out, an assumption for the kind.", min=0)
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, instead of the recipe's.", min=1)] = None,
    layouts: Annotated[int, typer.Option(help="How many layouts to show, the best first.", min=1)] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="The recipe may name code of its own.")] = False,
) -> None:
    """Say what a training run would take: memory, traffic, time, cost, and the best layout over the cards. Needs no GPU."""
    from bessemer.pipeline.planning import planned
    from bessemer.scaling.hardware import find_card
    from bessemer.scaling.job import TrainingJob
    from bessemer.scaling.planner import plan_summary, plans, requested_plan

    asked, card = planned(recipe, overrides or [], allow_code=allow_code), find_card(gpu)
    job = TrainingJob(asked.model, asked.settings, card)
    found = plans(job, gpus, count=layouts)
    total = tokens or asked.tokens or found[0].tokens_per_second * 60 * (asked.minutes or 0)
    result = {"name": asked.name} | plan_summary(
        found, tokens=total, price=card.price if price is None else price, asked=requested_plan(job, gpus)
    )
    result["price_is_assumed"] = price is None
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from rich.console import Console

    from bessemer.views.planning import show_plan

    Console(highlight=False).print(show_plan(result))
