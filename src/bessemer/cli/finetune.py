"""`bessemer finetune`, and `bessemer label`: rankings of a model's answers, as pairs to train on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.options import Device, Model, Runs

if TYPE_CHECKING:
    from bessemer.core.progress import Progress
    from bessemer.posttraining.sft.config import FinetuneConfig
    from bessemer.posttraining.sft.finetune import Finetuned
    from bessemer.posttraining.sft.forgetting import GeneralTasks


def finetune(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str, typer.Argument(help="The data: a table, a folder of tables or texts, or hub:ORGANISATION/NAME#SPLIT.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make. The same command continues an interrupted fine-tuning.")],
    also: Annotated[
        list[str] | None,
        typer.Option(help="FILE or FILE=TIMES: further data, and how often it comes in a pass; may be repeated."),
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of the questions (default: found by its name).")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column of the answers (default: found by its name).")] = None,
    method: Annotated[str, typer.Option(help="full, lora, qlora; auto: the first of these that fits into memory.")] = "auto",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 2.0,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate (default 1e-5 for full, 2e-4 for an adapter).")
    ] = None,
    base_dtype: Annotated[
        str, typer.Option(help="Type of the frozen weights under an adapter: float32, bf16, or for qlora int8, int4, nf4.")
    ] = "auto",
    rank: Annotated[int, typer.Option(help="Rank of an adapter.", min=1)] = 16,
    alpha: Annotated[float | None, typer.Option(help="Updates are scaled by alpha / rank (default: twice the rank).")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout of the adapter's inputs.")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale updates by alpha / √rank.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Also train the norms of the weights' rows (DoRA).")] = False,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(help="A linear layer that the adapter changes: q_proj, layers.[0-3].*, all-linear; may be repeated."),
    ] = None,
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option(
            help="A module whose own weights are trained besides the adapter: embed_tokens, lm_head, norm; may be repeated."
        ),
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Tokens of a row (default: those of the longest conversation, at most 2,048).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows of a batch (default: as many as hold eight conversations).")
    ] = None,
    tokens_per_batch: Annotated[
        int | None, typer.Option(help="Most tokens of a micro-batch (default: as many as fit into memory).", min=1)
    ] = None,
    checkpointing: Annotated[
        str, typer.Option(help="none; full: recompute blocks, a third slower, in less memory; auto: if memory needs it.")
    ] = "auto",
    truncate: Annotated[
        str, typer.Option(help="Conversations longer than a row. drop: left out; left: cut at the beginning; refuse: an error.")
    ] = "drop",
    on_bad_row: Annotated[
        str, typer.Option(help="Rows that cannot be used. skip: left out, at most a twentieth; stop: an error.")
    ] = "skip",
    held_out: Annotated[float, typer.Option(help="Share of the data that is held out.")] = 0.1,
    merge: Annotated[bool, typer.Option("--merge", help="Also merge the adapter into OUT/model; later too.")] = False,
    general: Annotated[
        str | None,
        typer.Option(
            help="Tasks, separated by commas, that are answered by likelihood before and after, to measure what is forgotten; "
            "none: not measured."
        ),
    ] = None,
    general_limit: Annotated[
        int | None, typer.Option(help="Number of items of each of these tasks (default 100).", min=2)
    ] = None,
    general_data: Annotated[Path | None, typer.Option(help="Folder of their data; those of the package need none.")] = None,
    fail_if_worse: Annotated[
        bool,
        typer.Option(
            "--fail-if-worse", help="Exit code 3 if the held-out loss is higher than before, with its whole interval."
        ),
    ] = False,
    min_improvement: Annotated[
        float | None, typer.Option(help="Exit code 3 if the held-out loss falls by less than this, in nats a token.")
    ] = None,
    max_loss: Annotated[float | None, typer.Option(help="Exit code 3 if the held-out loss ends above this.")] = None,
    max_forgetting: Annotated[
        float | None, typer.Option(help="Exit code 3 if the loss of general tasks rises by more than this, in nats a token.")
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb or trackio gets the metrics too; may be repeated.")
    ] = None,
    paged_optimizer: Annotated[
        bool,
        typer.Option(
            "--paged-optimizer", help="Keep the optimizer's states outside a card's memory, on a processor in a mapped file."
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Price of this machine for an hour: the plan says what the run costs.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and exit; nothing is written.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order, of the held-out rows, and of a new adapter.")] = 7,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Fine-tune a model on your questions and answers, and say whether it got better, and what it forgot.

    Exit code 0: done. 2: a mistake, and nothing was made. 3: the model was made, and breaks a limit that was given.
    """
    from bessemer.cli.named import given_options, model_source, option_of
    from bessemer.core.errors import writing_to
    from bessemer.core.progress import progress_for_terminal
    from bessemer.core.store import locked_folder
    from bessemer.posttraining.sft.config import FinetuneConfig
    from bessemer.posttraining.sft.forgetting import LIMITS_BROKEN, Limits

    names = ["method", "epochs", "learning_rate", "rank", "merge", "prompt_column", "answer_column", "context_length"]
    names += ["batch_size", "truncate", "on_bad_row", "held_out", "general_limit", "track", "tokens_per_batch", "checkpointing"]
    names += ["base_dtype", "alpha", "dropout", "rslora", "dora", "target_modules", "modules_to_save", "price_per_hour"]
    given = given_options(context, *names, "paged_optimizer")
    if general is not None:
        given["general"] = [] if general == "none" else [name for each in general.split(",") if (name := each.strip())]
    config = FinetuneConfig.parse(given | {"also": _weights(also or [])}, option_of("finetune"))
    limits = Limits.parse(
        given_options(context, "fail_if_worse", "min_improvement", "max_loss", "max_forgetting"), option_of("finetune")
    )
    limits.check(asks_tasks=bool(config.general))
    if dry_run:
        from bessemer.cli.plan import print_finetune_plan

        print_finetune_plan(config, model, data, seed=seed, device=device, runs=runs)
        return
    from bessemer.model.storage.tuned_folder import whole_weights
    from bessemer.posttraining.sft.finetune import asked_of, finish, finished
    from bessemer.posttraining.sft.finetune import finetune as tune
    from bessemer.posttraining.sft.report import record_lines

    source, progress = model_source(model, runs), progress_for_terminal()
    result = finished(out, lambda: asked_of(config, source, data, seed))
    if result is None:
        tasks = _general_tasks(config, general_data, runs, progress)
        with writing_to(out), locked_folder(out):
            tuned = tune(config, source, data, out, seed=seed, device=device, progress=progress, general=tasks)
            result = _result(tuned)
            finish(out, result)
            _write_report(out)
    if merge:
        whole_weights(out)
    for line in (*record_lines(result), _uses(out)):
        print(line)
    if broken := limits.broken(result):
        for sentence in broken:
            print(f"limit broken: {sentence}", file=sys.stderr)
        raise typer.Exit(LIMITS_BROKEN)


def _general_tasks(config: FinetuneConfig, data: Path | None, runs: Path, progress: Progress) -> GeneralTasks | None:
    """The general tasks of the settings, opened; data of tasks by name is fetched where it is missing."""
    if not config.general:
        return None
    from bessemer.evaluation.tasks import LikelihoodScores
    from bessemer.tasks.config import TaskOptions
    from bessemer.tasks.registry import find_tasks, with_data

    options = TaskOptions(data=data, limit=config.general_limit)
    options = with_data(config.general, options, runs / ".cache" / "tasks", progress.say)
    return LikelihoodScores(find_tasks(config.general, options))


def _write_report(out: Path) -> None:
    """Write `OUT/report.html`, where matplotlib is there to draw its curves."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return
    from bessemer.core.metrics import METRICS, read_metrics
    from bessemer.core.store import write_text
    from bessemer.model.storage.tuned_folder import read_record
    from bessemer.posttraining.sft.report import tuning_report
    from bessemer.views.report import render_report

    write_text(out / "report.html", render_report(tuning_report(out.name, read_record(out), read_metrics(out / METRICS))))


def _weights(given: list[str]) -> dict[str, float]:
    """What `--also FILE=TIMES` gives. Raises ConfigError for times that are no number, and a file that is named twice."""
    from bessemer.core.errors import ConfigError

    weights: dict[str, float] = {}
    for option in given:
        name, equals, times = option.rpartition("=")
        if not equals:
            name, times = option, "1"
        try:
            weight = float(times)
        except ValueError:
            raise ConfigError(f"--also {option}: {times!r} is not a number of times") from None
        if not name or name in weights:
            raise ConfigError(f"--also {option}: name a file, and each file once")
        weights[name] = weight
    return weights


def _result(tuned: Finetuned) -> dict[str, Any]:
    """The figures, and the end in words: better or not, by how much, how sure."""
    from bessemer.posttraining.sft.forgetting import forgetting
    from bessemer.posttraining.sft.report import verdict

    metrics = tuned.metrics
    unrendered = metrics.get("unrendered", 0)
    learnt = metrics["conversations"] - metrics["too_long"] - metrics["nothing_learnt"] - unrendered
    data = (
        f"conversations learnt: {learnt:,}, of which {metrics['cut']:,} with their beginning cut off; left out: "
        f"{metrics['too_long']:,} longer than a row, {metrics['nothing_learnt']:,} without anything to learn"
    )
    if unrendered:
        data += f", {unrendered:,} that the model's chat template cannot write"
    losses = zip(tuned.ids_N, tuned.before_N.tolist(), tuned.after_N.tolist(), strict=True)
    return {
        "data": data,
        **verdict(tuned.before_N, tuned.after_N),
        "method": tuned.method,
        "answers": list(tuned.answers),
        **({} if tuned.general is None else {"forgetting": forgetting(*tuned.general)}),
        **({} if tuned.memory is None else {"memory": tuned.memory}),
        "losses": {id: [before, after] for id, before, after in losses},
        "tokenizer": tuned.tokenizer_hash,
        "metrics": metrics,
    }


def _uses(out: Path) -> str:
    """The commands that use what was made."""
    import shlex

    name = shlex.quote(str(out))
    file = shlex.quote(f"{out.name}.gguf")
    return f"use it: bessemer chat {name} · bessemer serve {name} · bessemer export {name} {file}"


def label(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder of the labels. The same command continues where it was stopped.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts: CSV, JSON lines, JSON or Parquet (default: those that the run's SFT held out)."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Only the first prompts.", min=1)] = 50,
    answers: Annotated[int, typer.Option(help="Answers to each prompt.", min=2, max=16)] = 4,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the answers; with a higher one they differ more.", min=0.01)
    ] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the answers.")] = 7,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8001,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name that browsers may call the page by; * is any; may be repeated.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Rank a model's answers on a page, and get pairs to train on."""
    from bessemer.cli.named import find_model, option_of
    from bessemer.core.errors import ConfigError, writing_to
    from bessemer.core.progress import progress_for_terminal
    from bessemer.core.store import locked_folder
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.params import SamplingParams
    from bessemer.posttraining.labelling import read_prompts, sample_answers
    from bessemer.webapp.labelling import serve_labels

    folder = find_model(model, runs)
    held_out = folder.parent / "conversations" / "validation.jsonl"
    if prompts is None and not held_out.exists():
        raise ConfigError(f"--prompts: {model} has no held-out conversations of its own; name a file of prompts")
    params = SamplingParams.parse({"max_tokens": max_tokens, "temperature": temperature}, option_of("label"))
    prompts_read = read_prompts(held_out if prompts is None else prompts, limit)
    with writing_to(out), locked_folder(out), Engine(folder, device=device) as engine:
        labels = sample_answers(
            engine, prompts_read, out, count=answers, params=params, seed=seed, progress=progress_for_terminal()
        )
    hosts = [name.lower() for name in allow_host or ()]
    serve_labels(labels, out, host=host, port=port, hosts=hosts, browser=browser)
