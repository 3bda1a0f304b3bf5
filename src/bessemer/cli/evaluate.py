"""`bessemer evaluate`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="A model: a folder, a GGUF file, a run, or a pulled one.")],
    tasks: Annotated[str, typer.Option(help="Tasks by name or by YAML file, with commas between; core: CORE's.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the tasks' data; beside the task file if none.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first items of each task only.", min=1)] = None,
    shots: Annotated[int | None, typer.Option(help="Answered examples before each question; the task's own.", min=0)] = None,
    samples: Annotated[int | None, typer.Option(help="Answers to each item of tasks that generate.", min=1)] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--plain", help="Ask by the model's chat template, or not.")] = None,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    thinking_budget: Annotated[
        int | None,
        typer.Option(help="Tokens after which thinking is closed, with --chat; what follows it is judged.", min=0),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice of examples and of samples; the task's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; evaluations/MODEL-KEY if none.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="At most this many tokens of a prompt; the model's context.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Run or folder of the training documents, to look for the items in; of a run its own.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Evaluate a model on tasks. The same command goes on where it was stopped."""
    from rich.console import Console

    from bessemer.cli.named import find_model, option_of
    from bessemer.core.hashing import hash_value
    from bessemer.core.progress import progress_for_terminal
    from bessemer.core.store import write_text
    from bessemer.tasks.options import TaskOptions
    from bessemer.tasks.registry import find_tasks

    given = {
        "data": data,
        "limit": limit,
        "shots": shots,
        "samples": samples,
        "seed": seed,
        "chat": chat,
        "system": system,
        "thinking_budget": thinking_budget,
    }
    named = [name for each in tasks.split(",") if (name := each.strip())]
    found = find_tasks(named, TaskOptions.parse(given, option_of("evaluate")))
    place, documents = find_model(model, runs), _documents(corpus, model, runs)

    from bessemer.evaluation.judges import connected_judges
    from bessemer.evaluation.model_identity import model_identity
    from bessemer.evaluation.tasks import evaluate_tasks
    from bessemer.inference.engine import Engine, EngineConfig
    from bessemer.views.task_results import show_task_results

    config = EngineConfig.parse({"max_model_len": max_model_len}, option_of("evaluate"))
    name = Path(model).stem if place.is_file() else Path(model).name
    identity = model_identity(place, name, max_model_len)
    key = hash_value([identity, [[task.name, dict(task.settings)] for task in found]], bits=32)
    folder = out or Path("evaluations") / f"{name}-{key}"
    with connected_judges(found, device), Engine(place, device=device, config=config) as engine:
        results = evaluate_tasks(engine, found, folder, model=identity, progress=progress_for_terminal(), corpus=documents)
    Console(highlight=False).print(show_task_results(results))
    calibrated = {name: task for name, task in results["tasks"].items() if "calibration" in task}
    if calibrated and find_spec("matplotlib") is not None:
        from bessemer.views.reliability_chart import reliability_chart

        write_text(folder / "reliability.svg", reliability_chart(calibrated))
    print(folder)


def _documents(corpus: Path | None, model: str, runs: Path) -> Path | None:
    """The training documents: those of the folder, or of the run that the model is named by; None where there are none."""
    from bessemer.core.errors import ArtefactError
    from bessemer.evaluation.contamination import find_corpus

    if corpus is not None:
        return find_corpus(corpus if corpus.exists() else runs / corpus)
    for run in (Path(model), runs / model):
        if (run / "run.json").exists():
            try:
                return find_corpus(run)
            except ArtefactError:
                return None
    return None
