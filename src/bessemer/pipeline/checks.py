"""What a stage needs to be made, looked at before any stage runs: packages, the user's code, a device, a layout that fits."""

from __future__ import annotations

from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.packages import missing_package
from bessemer.core.usercode import load_user_function
from bessemer.pipeline.planning import model_of
from bessemer.pipeline.recipe import Recipe, Stage, feeding
from bessemer.pipeline.services import SERVICES
from bessemer.training.config import LoopConfig
from bessemer.training.task_scores import check_processes, open_tasks

_DEVICES_EVERYWHERE = ("auto", "cpu")


def check_stage(recipe: Recipe, stage: Stage, device: str, processes: int) -> None:
    """Raise ConfigError, one line that names the stage, for the first thing that is missing or does not fit.

    processes: how many make a stage that trains.
    """
    try:
        missing = missing_package(stage.spec.packages(stage.config))
        if missing is not None:
            raise ConfigError(missing)
        for function in stage.user_functions:
            load_user_function(function, recipe.folder)
        stage.spec.check(stage.config)
        if device not in _DEVICES_EVERYWHERE and any(source.kind == "model" for source in stage.inputs.values()):
            from bessemer.model.device import choose_device

            choose_device(device)
        if isinstance(stage.config, LoopConfig):
            if open_tasks(stage.config, recipe.folder, SERVICES.tasks) is not None:
                check_processes(processes)
            _check_layout(recipe, stage, stage.config, processes)
    except BessemerError as error:
        raise ConfigError(f"{stage.name}: {error}") from None


def _check_layout(recipe: Recipe, stage: Stage, config: LoopConfig, processes: int) -> None:
    """Raise ConfigError when a number of processes cannot share the model, its rows or their tokens as the settings say."""
    from bessemer.distributed.layout import Layout

    layout = Layout.of(config.parallel, processes)
    if layout.world_size == 1:
        return
    rows = layout.rows(0, config.batch_size)
    if (conflict := config.rows_conflict(layout.data_ranks, config.micro_batch_size)) is not None:
        raise ConfigError(conflict)
    layout.columns(0, config.context_length)
    if layout.pipeline > 1:
        layout.micro_batches(rows.stop - rows.start, config.micro_batch_size, config.parallel.pipeline_schedule)
    model = model_of(recipe.folder, feeding(recipe.stages, stage))
    if model is not None:
        # of how many tokens the vocabulary is to be is known, of how many it will be is not always: it stops nobody here
        layout.check(model.with_changes(vocab_size=model.vocab_size * layout.tensor), config.context_length)
