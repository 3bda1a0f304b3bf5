"""`bessemer evaluate`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.options import Device, Model, Runs, print_view


def _list_tasks(wanted: bool) -> None:
    """Print the tasks by name, and end."""
    if not wanted:
        return
    from bessemer.tasks.registry import describe_tasks

    for heading, rows in describe_tasks():
        print(f"Tasks {heading}:")
        for name, about in rows:
            print(f"  {name:<21} {about}")
    print("Or task files of your own, NAME.yaml, as the page on tasks of the documentation describes them")
    raise typer.Exit


def evaluate(
    context: typer.Context,
    model: Model,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks by name or YAML file, separated by commas; core: those of CORE; see --list-tasks. Default: the rows "
            "that finetune held out."
        ),
    ] = None,
    list_tasks: Annotated[
        bool, typer.Option("--list-tasks", help="List the tasks by name, and exit.", is_eager=True, callback=_list_tasks)
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the tasks' data, or the file of a task about pictures (default: the folder of the task file; for "
            "tasks by name the data are downloaded)."
        ),
    ] = None,
    fetch: Annotated[bool, typer.Option(help="Download the data of tasks by name, if there is no --data.")] = True,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task.", min=1)] = None,
    shots: Annotated[
        int | None, typer.Option(help="Solved examples before each question (default: as the task says).", min=0)
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Number of answers to each item of tasks that generate.", min=1)] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--plain", help="Render questions by the model's chat template, or not.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    thinking_budget: Annotated[
        int | None, typer.Option(help="With --chat, most tokens of thinking; the answer after it is judged.", min=0)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the choice of examples and of sampling (default: as the task says).")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a low-rank adapter of the model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results (default evaluations/MODEL-KEY).")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of a prompt (default: the model's context).")] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Run or folder of training documents in which items are looked for (default for a run: its own)."),
    ] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Evaluate a model on tasks. The same command goes on where it was stopped."""
    from bessemer.cli.named import find_served, given_options, option_of
    from bessemer.core.errors import writing_to
    from bessemer.core.hashing import hash_value
    from bessemer.core.progress import progress_for_terminal
    from bessemer.core.store import locked_folder, write_text
    from bessemer.tasks.config import TaskOptions
    from bessemer.tasks.registry import find_tasks, with_data

    given = given_options(context, "data", "limit", "shots", "samples", "seed", "chat", "system", "thinking_budget")
    named = [name for each in (tasks or _held_out(model)).split(",") if (name := each.strip())]
    options, progress = TaskOptions.parse(given, option_of("evaluate")), progress_for_terminal()
    if fetch:
        options = with_data(named, options, runs / ".cache" / "tasks", progress.say)
    chosen = find_tasks(named, options)
    place, documents = find_served(model, runs), _documents(corpus, model, runs)

    from bessemer.evaluation.evaluation_folder import model_identity
    from bessemer.evaluation.tasks import connected_judges, evaluate_tasks
    from bessemer.inference.engine import Engine, EngineConfig
    from bessemer.views.terminal import show_task_results

    config = EngineConfig.parse({"max_model_len": max_model_len}, option_of("evaluate"))
    name = Path(model).name.removesuffix(".gguf")
    if adapter is not None:
        name = f"{name}-{adapter.resolve().name}"
    identity = model_identity(place, name, max_model_len, adapter=adapter)
    key = hash_value([identity, [[task.name, dict(task.settings)] for task in chosen]], bits=32)
    folder = out or Path("evaluations") / f"{name}-{key}"
    with (
        writing_to(folder),
        locked_folder(folder),
        connected_judges(chosen, device),
        Engine(place, device=device, config=config, adapter=adapter) as engine,
    ):
        results = evaluate_tasks(engine, chosen, folder, model=identity, progress=progress, corpus=documents)
    print_view(show_task_results(results))
    calibrated = {name: task for name, task in results["tasks"].items() if "calibration" in task}
    if calibrated and find_spec("matplotlib") is not None:
        from bessemer.views.charts import reliability_chart

        write_text(folder / "reliability.svg", reliability_chart(calibrated))
    print(folder)


def _held_out(model: str) -> str:
    """The task file of a fine-tuning's held-out data; empty where there is none."""
    from bessemer.model.storage.tuned_folder import HELD_OUT_TASK

    task = Path(model) / HELD_OUT_TASK
    return str(task) if task.is_file() else ""


def _documents(corpus: Path | None, model: str, runs: Path) -> Path | None:
    """The training documents, of --corpus or of the run that the model is named by; None where there are none.

    Without --corpus also None, with a note, where the package that searches them is missing.
    """
    from bessemer.core.environment import missing_package
    from bessemer.core.errors import ArtefactError
    from bessemer.evaluation.contamination import find_corpus

    if corpus is not None:
        return find_corpus(corpus if corpus.exists() else runs / corpus)
    for run in (Path(model), runs / model):
        if (run / "run.json").exists():
            try:
                documents = find_corpus(run)
            except ArtefactError:
                return None
            if (missing := missing_package(["numba"])) is None:
                return documents
            print(f"the tasks' items are not looked for in the run's corpus: {missing}", file=sys.stderr)
            return None
    return None
