"""`bessemer merge`, `average` and `extend`: a model with other weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.options import Device, Runs

if TYPE_CHECKING:
    from bessemer.model.merging.config import MergeConfig
    from bessemer.model.merging.models import ModelPlace


def average(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Two or more of RUN@STEP: the last of a run, or of runs that began as one.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the model to write.")],
) -> None:
    """Write the model whose weights are the mean of checkpoints'."""
    from bessemer.core.errors import ConfigError
    from bessemer.core.store import new_folder
    from bessemer.model.storage.folder import save_model
    from bessemer.training.checkpoint.export import averaged_model, find_checkpoint

    if len(checkpoints) < 2:
        raise ConfigError("give at least two checkpoints, RUN@STEP RUN@STEP, and then the folder to write")
    with new_folder(out) as folder:
        model, tokenizer = averaged_model([find_checkpoint(name, Path(), where="RUN@STEP") for name in checkpoints])
        save_model(model, folder, tokenizer=tokenizer)
    print(f"{out}: the mean of {len(checkpoints)} checkpoints, {model.config.parameters():,} parameters")


def merge(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL… [OUT]",
            help="What finetune wrote, or with --adapter any model; then the folder to make (of one fine-tuning alone, its own "
            "folder model if none). Or several models, as MODEL or MODEL=WEIGHT, or a file of mergekit's; then the folder.",
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Folder of a low-rank adapter of the model, or FOLDER=WEIGHT; may be repeated."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Of several: linear, slerp, task_arithmetic, ties, dare_linear or dare_ties; of adapters into an adapter also "
            "factors. If none, linear for models, task_arithmetic for adapters."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model that the others were trained from.")] = None,
    density: Annotated[float, typer.Option(help="ties, dare: share of the differences that are kept.", min=0.0, max=1.0)] = 1.0,
    t: Annotated[
        str,
        typer.Option(help="slerp: 0 is the first model, 1 the second; a list such as 0,0.5,1 is interpolated over the layers."),
    ] = "0.5",
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Divide by the weights' sum (default: linear and ties do)."),
    ] = None,
    factor: Annotated[float, typer.Option(help="Factor of the merged difference (lambda).")] = 1.0,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Merge several adapters into one adapter, and write no model.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(help="--as-adapter: approximate with this rank (default for sums: exact).", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of dare's dropping.")] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the written weights: f32, f16 or bf16 (default f32; for several models, the first one's)."),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(help="Text to measure all models on, and the merged one: a run, its tokens, documents or a text file."),
    ] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Write a model with an adapter merged into its weights, or merge several models or adapters into one."""
    from bessemer.core.config import nearest
    from bessemer.core.errors import ConfigError
    from bessemer.model.formats import FLOATS

    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"--dtype: there is no {dtype!r}{nearest(dtype, list(FLOATS))}; {', '.join(FLOATS)}")
    is_file = Path(models[0]).suffix in (".yaml", ".yml")
    if len(models) <= 2 and len(adapter or ()) <= 1 and not is_file:
        several = ("method", "base", "density", "t", "normalize", "factor", "as_adapter", "rank", "seed", "evaluate")
        for name in several:
            if (given := context.get_parameter_source(name)) is not None and given.name != "DEFAULT":
                option = f"--{name}".replace("_", "-")
                raise ConfigError(
                    f"{option}: of several models or adapters; give another MODEL before OUT, or another --adapter"
                )
        _merge_one(models[0], Path(models[1]) if len(models) > 1 else None, adapter[0] if adapter else None, dtype, runs)
        return
    if len(models) < 2:
        raise ConfigError("merge: name the folder to make at the end: bessemer merge MODEL… FOLDER")
    as_torch = None if dtype is None else FLOATS[dtype]
    settings: dict[str, Any] = {
        "density": density,
        "t": _numbers("t", t),
        "normalize": normalize,
        "factor": factor,
        "seed": seed,
        "dtype": as_torch,
    }
    *named, out = models
    if is_file:
        if method is not None or base is not None or adapter or as_adapter:
            raise ConfigError("merge: the file says how models are merged; leave out --method, --base and --adapter")
        _merge_by_file(Path(named[0]), Path(out), as_torch, seed, evaluate, device, runs)
    elif as_adapter:
        _merge_into_adapter(named, adapter or [], method, settings, rank, Path(out), runs)
    else:
        if rank is not None:
            raise ConfigError("--rank: of an adapter; write one with --as-adapter")
        _merge_several(named, adapter or [], method, base, settings, Path(out), evaluate, device, runs)


def _merge_one(model: str, out: Path | None, adapter_: str | None, dtype: str | None, runs: Path) -> None:
    """One adapter into its base."""
    from bessemer.cli.named import find_model
    from bessemer.core.errors import ArtefactError, ConfigError
    from bessemer.model.formats import FLOATS
    from bessemer.model.storage.tuned_folder import is_tuned, merge_adapter, tuned_model, whole_weights

    adapter = None if adapter_ is None else Path(adapter_)
    dtype = dtype or "f32"
    if out is None and (adapter is not None or not is_tuned(Path(model))):
        raise ConfigError("merge: name the folder to make: bessemer merge MODEL FOLDER --adapter ADAPTER")
    base = None
    if adapter is None:
        tuned = tuned_model(Path(model), whole=False)
        if tuned is None:
            raise ConfigError(f"merge: {model} is not what finetune wrote; name its adapter with --adapter")
        base, adapter = tuned
        if adapter is None:
            raise ArtefactError(f"{model}: all weights were tuned, and {base} has them; there is nothing to merge")
    if out is None:
        if dtype != "f32":
            raise ConfigError("--dtype: name the folder to make; that of the fine-tuning itself is in f32")
        print(f"{whole_weights(Path(model))}: the model with its adapter merged into it")
        return
    base = base or find_model(model, runs)
    import torch

    merge_adapter(base, adapter, out, getattr(torch, FLOATS[dtype]))
    print(f"{out}: {base} with {adapter} merged into it")


def _merge_several(
    named: list[str],
    adapters: list[str],
    method: str | None,
    base: str | None,
    settings: dict[str, Any],
    out: Path,
    evaluate: Path | None,
    device: str,
    runs: Path,
) -> None:
    """Models, or a model with several adapters, into one model."""
    from bessemer.cli.named import find_model, option_of
    from bessemer.core.errors import ConfigError
    from bessemer.model.merging.config import METHODS, MergeConfig
    from bessemer.model.merging.models import ModelPlace

    given = [_weighted(one) for one in (adapters or named)]
    if method == "factors":
        raise ConfigError("--method factors: sums the parts of adapters; write an adapter with --as-adapter")
    if adapters:
        if len(named) > 1:
            raise ConfigError(f"--adapter: the adapters of one model are merged, and {len(named)} models are named")
        method = method or "task_arithmetic"
        if base is not None:
            raise ConfigError("--base: the adapters' is the model itself")
        base = named[0] if method not in METHODS or METHODS[method].needs_base else None
        folder = find_model(named[0], runs)
        places = [ModelPlace(name, folder, Path(name)) for name, _ in given]
    else:
        places = [_place(name, runs) for name, _ in given]
    models = [{"model": name} | ({} if weight is None else {"weight": weight}) for name, weight in given]
    values = settings | {"method": method or "linear", "models": models, "base": base}
    config = MergeConfig.parse(values, option_of("merge"))
    _write(config, places, None if base is None else _place(base, runs), out, evaluate, device)


def _merge_by_file(path: Path, out: Path, dtype: str | None, seed: int, evaluate: Path | None, device: str, runs: Path) -> None:
    """As a file of mergekit's says, or one with the settings of the stage."""
    from bessemer.core.errors import ConfigError
    from bessemer.core.yaml_file import read_yaml
    from bessemer.model.merging.config import MergeConfig, from_mergekit

    values = read_yaml(path).values
    config = from_mergekit(values, str(path)) if "merge_method" in values else MergeConfig.parse(values, str(path))
    if not config.models:
        raise ConfigError(f"{path}: models: name at least two models")
    changes = {"seed": seed if config.seed is None else config.seed} | ({} if dtype is None else {"dtype": dtype})
    places = [_place(one.model, runs) for one in config.models]
    base = None if config.base is None else _place(config.base, runs)
    _write(config.with_changes(**changes), places, base, out, evaluate, device)


def _write(
    config: MergeConfig, places: list[ModelPlace], base: ModelPlace | None, out: Path, evaluate: Path | None, device: str
) -> None:
    from bessemer.core.progress import progress_for_terminal
    from bessemer.model.merging.config import describe
    from bessemer.model.merging.models import merged_folder

    record = merged_folder(config, places, base, out, seed=config.seed or 0, progress=progress_for_terminal())
    print(f"{out}: {describe(config)}, {record['parameters']:,} parameters")
    if evaluate is not None:
        _evaluate([*places, *([base] if base else [])], out, evaluate, device)


def _evaluate(before: list[ModelPlace], merged: Path, source: Path, device: str) -> None:
    """Bits per byte of the models that went in and of the merged one, on the same text."""
    from bessemer.core.errors import ArtefactError
    from bessemer.core.progress import progress_for_terminal
    from bessemer.evaluation.quantisation import compare_quality, opened_tokens
    from bessemer.model.adapters.folder import read_adapter
    from bessemer.model.adapters.trained import merged as with_adapter
    from bessemer.model.device import choose_device
    from bessemer.model.storage.folder import load_model
    from bessemer.tokenization.tokenizer import load_tokenizer

    where = choose_device(device)
    whole = load_model(merged, where)
    rows = []
    with opened_tokens(source, load_tokenizer(merged)) as tokens:
        shards = tokens.held_out or tokens.train
        if shards is None:
            raise ArtefactError(f"{source}: no text to read")
        for place in before:
            model = load_model(place.folder, where)
            model = model if place.adapter is None else with_adapter(model, read_adapter(place.adapter, model))
            rows.append((place.name, compare_quality(model, whole, shards, max_tokens=None, progress=progress_for_terminal())))
    width = max(len(name) for name, _ in rows)
    for name, found in rows:
        agree = f"the merged model's likeliest token is its own at {found.agreement:.1%} of {found.tokens:,} tokens"
        print(f"{name:<{width}}  {found.bits_per_byte[0]:.4f} bits per byte; {agree}")
    print(f"{'merged':<{width}}  {rows[0][1].bits_per_byte[1]:.4f} bits per byte")


def _merge_into_adapter(
    named: list[str],
    adapters: list[str],
    method: str | None,
    settings: dict[str, Any],
    rank: int | None,
    out: Path,
    runs: Path,
) -> None:
    """Adapters of one model into one adapter: folders of adapters, or fine-tunings of one base."""
    from bessemer.cli.named import find_model, option_of
    from bessemer.core.config import nearest
    from bessemer.core.errors import ConfigError
    from bessemer.core.progress import progress_for_terminal
    from bessemer.model.merging.adapters import ADAPTER_METHODS, merged_adapter_folder
    from bessemer.model.merging.config import MergeConfig
    from bessemer.model.storage.tuned_folder import tuned_model

    method = method or "task_arithmetic"
    if method not in ADAPTER_METHODS:
        raise ConfigError(f"--method: there is no {method!r} for adapters{nearest(method, list(ADAPTER_METHODS))}")
    if settings["dtype"] is not None:
        raise ConfigError("--dtype: an adapter is written in float32")
    given = [_weighted(one) for one in (adapters or named)]
    if adapters:
        if len(named) > 1:
            raise ConfigError(f"--adapter: the adapters of one model are merged, and {len(named)} models are named")
        folder, folders = find_model(named[0], runs), [Path(name) for name, _ in given]
    else:
        tuned = [tuned_model(Path(name), whole=False) for name, _ in given]
        for (name, _), one in zip(given, tuned, strict=True):
            if one is None or one.adapter is None:
                raise ConfigError(f"--as-adapter: {name} is no fine-tuning with an adapter; name adapters with --adapter")
        folders = [one.adapter for one in tuned if one is not None and one.adapter is not None]
        folder = next(one.folder for one in tuned if one is not None)
    if len(folders) < 2 and rank is None:
        raise ConfigError("--as-adapter: one adapter alone; name another, or a smaller --rank for it")
    models = [{"model": name} | ({} if weight is None else {"weight": weight}) for name, weight in given]
    values = settings | {"method": "task_arithmetic" if method == "factors" else method, "models": models}
    # what they differ from is the model without them
    values["base"] = str(folder)
    config = MergeConfig.parse(values, option_of("merge"))
    merged = merged_adapter_folder(
        folder, folders, config, method, out, rank=rank, seed=config.seed or 0, progress=progress_for_terminal()
    )
    ranks = sorted({len(update.down_RK) for update in merged.updates.values()})
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    print(f"{out}: an adapter, {method} of {len(folders)} adapters of {folder}, {shown}")


def _place(name: str, runs: Path) -> ModelPlace:
    """A model by its name; a fine-tuning as its base and its adapter, which are not merged on disk."""
    from bessemer.cli.named import find_model
    from bessemer.model.merging.models import ModelPlace, place_of
    from bessemer.model.storage.tuned_folder import is_tuned

    return place_of(name, Path(name)) if is_tuned(Path(name)) else ModelPlace(name, find_model(name, runs))


def _weighted(argument: str) -> tuple[str, float | list[float] | None]:
    """MODEL or MODEL=WEIGHT; a weight may be a list with commas, which runs over the layers."""
    name, has_weight, weight = argument.rpartition("=")
    if not has_weight or Path(argument).exists():
        return argument, None
    return name, _numbers(argument, weight)


def _numbers(what: str, text: str) -> float | list[float]:
    from bessemer.core.errors import ConfigError

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{what}: {text!r} is no number, and no list of numbers with commas") from None
    return numbers[0] if len(numbers) == 1 else numbers


def extend(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="A tokenizer's folder, or a model: a folder, a GGUF file, a run, or a pulled one."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    token: Annotated[list[str] | None, typer.Option(help="A token that is found in any text; may be repeated.")] = None,
    special: Annotated[
        list[str] | None, typer.Option(help="A control token, which only templates write; may be repeated.")
    ] = None,
    init: Annotated[
        str, typer.Option(help="A model's new rows: mean, of all, or subtokens, of what wrote it before.")
    ] = "mean",
    runs: Runs = Path("runs"),
) -> None:
    """Add tokens to a tokenizer, or to a model and its tokenizer. Ids that exist keep their tokens and their weights."""
    from bessemer.cli.named import as_folder, find_model
    from bessemer.core.errors import ConfigError
    from bessemer.core.store import follow, new_folder

    if not token and not special:
        raise ConfigError("nothing to add: give --token or --special")
    if init not in ("mean", "subtokens"):
        raise ConfigError(f"--init: {init!r} is not one of mean, subtokens")
    folder = follow(Path(source))
    if (folder / "tokenizer.json").exists() and not (folder / "config.json").exists():
        from bessemer.tokenization.existing import add_tokens

        with new_folder(out) as written:
            extension = add_tokens(folder, written, token or [], special or [])
    else:
        from bessemer.model.stage import extend_model

        with as_folder(find_model(source, runs), out) as model:
            extension = extend_model(model, out, token or [], special or [], init="mean" if init == "mean" else "subtokens")
    for known, id in extension.skipped.items():
        print(f"skipped {known!r}: it is one token already, id {id}")
    for id, added in extension.added.items():
        print(f"{id}  {added!r}")
    print(f"{out}: {extension.size + len(extension.added):,} tokens, {len(extension.added):,} of them new")
