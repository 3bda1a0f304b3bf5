"""`bessemer plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.options import Runs, print_view

if TYPE_CHECKING:
    from bessemer.posttraining.sft.config import FinetuneConfig
    from bessemer.scaling.serving import ServingJob


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file, or a preset of the model; --finetune: a model.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="KEY=VALUE, as in pretrain.batch_size=256; --finetune: the table, and KEY=VALUE as in epochs=3."),
    ] = None,
    gpus: Annotated[int, typer.Option(help="Number of cards.", min=1)] = 1,
    gpu: Annotated[str, typer.Option(help="Kind of card: h100, h200, b200, a100, rtx4090, cpu, …")] = "h100",
    price: Annotated[
        float | None, typer.Option(help="Dollars per hour of one card (default: an assumption for the kind).", min=0)
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, instead of the recipe's.", min=1)] = None,
    layouts: Annotated[int, typer.Option(help="How many layouts to show, the best first.", min=1)] = 4,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Plan `bessemer finetune MODEL DATA`; nothing is trained.")
    ] = False,
    method: Annotated[str, typer.Option(help="--finetune: full, lora, qlora or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="--finetune: auto, cpu, cuda or mps.")] = "auto",
    serve: Annotated[bool, typer.Option("--serve", help="Plan serving the model instead.")] = False,
    weights: Annotated[str, typer.Option(help="--serve: the weights' type: f32, bf16, int8 or int4.")] = "bf16",
    prompt_tokens: Annotated[int, typer.Option(help="--serve: tokens of a usual prompt.", min=1)] = 1000,
    answer_tokens: Annotated[int, typer.Option(help="--serve: tokens of a usual answer.", min=1)] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="The recipe may name code of its own.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Say what a training run would take: memory, traffic, time, cost, and the best layout over the cards. Needs no GPU.

    With --serve what serving the model would take: memory, conversations at once, speed, and the cost of a million tokens. With
    --finetune MODEL DATA what tuning it on this machine would take: rows, steps, and memory by method.
    """
    if finetune:
        _plan_finetuning(recipe, overrides or [], method, device, runs, as_json)
        return
    from bessemer.pipeline.planning import training_plan
    from bessemer.scaling.hardware import find_card
    from bessemer.scaling.job import PlannedJob
    from bessemer.scaling.planner import plan_summary, plans, requested_plan
    from bessemer.scaling.serving import ServingJob

    training, card = training_plan(recipe, overrides or [], allow_code=allow_code), find_card(gpu)
    if serve:
        job = ServingJob(training.model, card, gpus, weights, prompt_tokens, answer_tokens)
        _plan_serving(training.name, job, price, as_json)
        return
    training_job = PlannedJob(training.model, training.settings, card)
    training_plans = plans(training_job, gpus, count=layouts)
    total = tokens or training.tokens or training_plans[0].tokens_per_second * 60 * (training.minutes or 0)
    result = {"name": training.name} | plan_summary(
        training_plans, tokens=total, price=card.price if price is None else price, asked=requested_plan(training_job, gpus)
    )
    result["price_is_assumed"] = price is None
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from bessemer.views.planning import show_plan

    print_view(show_plan(result))


def _plan_finetuning(model: str, given: list[str], method: str, device: str, runs: Path, as_json: bool) -> None:
    from bessemer.core.errors import ConfigError
    from bessemer.core.yaml_file import parse_value
    from bessemer.posttraining.sft.config import FinetuneConfig

    if not given or "=" in given[0]:
        raise ConfigError("--finetune: name a model and a table: bessemer plan --finetune MODEL DATA")
    settings = {
        key: parse_value(value, f"override {key}") for key, _, value in (override.partition("=") for override in given[1:])
    }
    config = FinetuneConfig.parse({"method": method, **settings}, "plan --finetune")
    print_finetune_plan(config, model, given[0], device=device, runs=runs, as_json=as_json)


def print_finetune_plan(
    config: FinetuneConfig, model: str, data: str, *, device: str, runs: Path, seed: int = 7, as_json: bool = False
) -> None:
    """Print what a fine-tuning would take; nothing is imported, trained or written."""
    from tempfile import TemporaryDirectory

    from bessemer.cli.named import model_source
    from bessemer.posttraining.sft.finetune_plan import plan_finetuning

    with TemporaryDirectory() as scratch:
        source = model_source(model, runs)
        finetune_plan = plan_finetuning(config, source, data, seed=seed, device=device, scratch=Path(scratch))
    if as_json:
        print(json.dumps(finetune_plan.figures, indent=2))
        return
    from bessemer.views.planning import show_finetune_plan

    print_view(show_finetune_plan(model, Path(data).name, finetune_plan.figures))


def _plan_serving(name: str, job: ServingJob, price: float | None, as_json: bool) -> None:
    from bessemer.core.config import nearest
    from bessemer.core.errors import ConfigError
    from bessemer.scaling.serving import WEIGHT_BYTES, serving_plan
    from bessemer.views.planning import show_serving_plan

    if job.weights not in WEIGHT_BYTES:
        known = f"{', '.join(WEIGHT_BYTES)}{nearest(job.weights, list(WEIGHT_BYTES))}"
        raise ConfigError(f"--weights {job.weights}: it is {known}")
    tokens, context = job.prompt + job.answer, job.model.max_position_embeddings
    if tokens > context:
        raise ConfigError(
            f"--prompt-tokens and --answer-tokens are {tokens:,} together, and the model's context is {context:,}"
        )
    values = {"name": name, "price_is_assumed": price is None} | serving_plan(job, job.card.price if price is None else price)
    if as_json:
        print(json.dumps(values, indent=2))
    else:
        print_view(show_serving_plan(values))
