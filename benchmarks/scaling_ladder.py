"""Whether a scaling law predicts a model of eight times the compute before it is trained.

    python benchmarks/scaling_ladder.py predict [--out FOLDER]   # trains the ladder, fits the law, writes the prediction
    python benchmarks/scaling_ladder.py target [--out FOLDER]    # then trains the model that was predicted, and seeds
    python benchmarks/scaling_ladder.py rates [--out FOLDER]     # whether the learning rate was right at two lengths

The recipe `ladder` on the quickstart's text: models of several widths and one depth (`--layers 1` or `4`), by `bessemer sweep`;
`bessemer scaling fit` and `predict`, by grid and by Huber. The prediction is to be committed before the second command, which
takes it from the result and changes nothing of it. No token is read more than twice. Three seeds of one member say how much a
run's loss is luck.

About half an hour each on two quiet cores; what is finished in the folder is not done again. Results: `scaling_ladder_1.json`,
`scaling_ladder_4.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import recording
from bessemer.core.progress import progress_for_terminal
from bessemer.pipeline.planning import training_plan
from bessemer.pipeline.run_folder import RunFolder
from bessemer.pipeline.sweep import Member, TrainedRun, members, sweep
from bessemer.scaling.laws.fit import fit_law
from bessemer.scaling.laws.parametric import Point, Points
from bessemer.scaling.suggest import Prediction, fitted_law, predict_loss
from bessemer.tokenization.shards import TokenShards

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/recipes/ladder.yaml",
    "src/bessemer/scaling/laws",
    "src/bessemer/training",
    "src/bessemer/model",
    "src/bessemer/data",
    "src/bessemer/tokenization",
)

RECIPE = "ladder"
_WIDTH_KEYS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class Design:
    """A ladder of one depth, and what it is to predict. A model of width 32 n has n heads in each layer."""

    layers: int
    #: Hidden width → tokens, in thousands.
    members: dict[int, tuple[int, ...]]
    #: Width and thousands of tokens of the model that is predicted.
    target: tuple[int, int]
    #: The member that is trained with two seeds more.
    repeated: tuple[int, int]

    @property
    def result(self) -> str:
        """The name of the result."""
        return f"scaling_ladder_{self.layers}"

    def settings(self, width: int) -> dict[str, int]:
        """A model's settings by its width."""
        heads = width // 32
        return dict(zip(_WIDTH_KEYS, (width, heads, heads, 3 * width), strict=True))

    def overrides(self, runs: Sequence[tuple[int, int]]) -> list[str]:
        """Overrides of a sweep over (width, thousands of tokens), whose values go together, and what is alike for all."""
        columns = {f"model.{key}": [self.settings(width)[key] for width, _ in runs] for key in _WIDTH_KEYS}
        columns["pretrain.tokens"] = [1_000 * thousands for _, thousands in runs]
        varied = [
            f"{key}={','.join(f'{value:_}' if key == 'pretrain.tokens' else str(value) for value in values)}"
            for key, values in columns.items()
        ]
        return [*varied, f"model.num_hidden_layers={self.layers}", "pretrain.dtype=bfloat16"]


DESIGNS = {
    # A single layer cannot copy from what came before by two steps of attention, which deeper models learn at their own time.
    1: Design(
        1,
        {32: (3_200, 6_400, 12_000), 64: (3_200, 6_400, 9_600), 96: (1_600, 3_200, 6_400), 128: (1_600, 2_400, 4_200)},
        (288, 10_400),
        (64, 3_200),
    ),
    4: Design(
        4,
        {64: (1_600, 2_400, 4_800, 7_200), 96: (1_600, 2_400, 3_600), 128: (1_600, 2_400)},
        (192, 9_600),
        (64, 2_400),
    ),
}
#: Learning rates of the matrices that are tried at the smallest size, on thousands of tokens: the optimum must not move.
RATES, RATE_TOKENS = ("1.75e-3", "3.5e-3", "7e-3"), (1_600, 4_800)
SEEDS = (7, 8, 9)
CONFIDENCE = 0.9


def trained(chosen: Sequence[Member], runs: Path) -> list[TrainedRun]:
    """The members' pretraining, run where they have not been. Ends the benchmark when one failed."""
    outcomes = sweep(RECIPE, chosen, runs=runs, until="pretrain", progress=progress_for_terminal())
    for outcome in outcomes:
        if outcome.run is None:
            raise SystemExit(f"{outcome.member.name}: {outcome.problem}")
    return [outcome.run for outcome in outcomes if outcome.run is not None]


def train_ladder(design: Design, runs: Path) -> list[TrainedRun]:
    """All members of the ladder."""
    sizes = [(width, thousands) for width, lengths in design.members.items() for thousands in lengths]
    given = design.overrides(sizes)
    keys = [text.partition("=")[0] for text in given[: len(_WIDTH_KEYS) + 1]]
    return trained(members(RECIPE, given, zipped=[keys], name="widths"), runs)


def tried_rates(design: Design, runs: Path) -> list[list[float]]:
    """(learning rate, tokens, bits per byte) of the smallest size."""
    rates = f"pretrain.matrix_learning_rate={','.join(RATES)}"
    tokens = f"pretrain.tokens={','.join(f'{1_000 * thousands:_}' for thousands in RATE_TOKENS)}"
    depth = f"model.num_hidden_layers={design.layers}"
    found = trained(members(RECIPE, [rates, tokens, depth], name="rates"), runs)
    given = [(float(rate), thousands) for rate in RATES for thousands in RATE_TOKENS]
    return [[rate, 1_000 * thousands, one.losses["bits_per_byte"]] for (rate, thousands), one in zip(given, found, strict=True)]


def predicted(design: Design, ladder: Sequence[TrainedRun]) -> dict[str, Prediction]:
    """The target's loss by method."""
    points = Points(tuple(Point(one.parameters, one.tokens, one.losses["bits_per_byte"], one.flops) for one in ladder))
    base = training_plan(RECIPE, design.overrides([design.target]))
    assert base.tokens is not None
    return {
        method: predict_loss(
            fitted_law(fit_law(points, method, metric="bits_per_byte"), "the ladder"),
            base.model,
            base.tokens,
            base.settings.context_length,
            CONFIDENCE,
        )
        for method in ("grid", "huber")
    }


def epochs(design: Design, runs: Path, name: str) -> float:
    """How often the longest run reads a token of the training split."""
    tokens = RunFolder(runs, name).stages()["tokenize"] / "tokens" / "train"
    return 1_000 * max(design.target[1], *(max(lengths) for lengths in design.members.values())) / TokenShards(tokens).tokens


def ladder_table(ladder: Sequence[TrainedRun]) -> dict[str, Any]:
    return recording.table(
        [("parameters", ",.0f"), ("tokens", ",.0f"), ("FLOPs", ".2e"), ("bits per byte", ".4f")],
        [[one.parameters, one.tokens, one.flops, one.losses["bits_per_byte"]] for one in ladder],
    )


def save(design: Design, figures: dict[str, Any], ladder: Sequence[TrainedRun]) -> None:
    """Write the result with its tables."""
    measured = figures.get("target", {}).get("bits_per_byte")
    rows = [
        [method, one["loss"], one["interval"], measured, None if measured is None else one["loss"] / measured - 1]
        for method, one in figures["predictions"].items()
    ]
    columns = [
        ("fit", "s"),
        ("predicted", ".4f"),
        (f"{CONFIDENCE:.0%} of runs", ".4f"),
        ("measured", ".4f"),
        ("difference", "+.2%"),
    ]
    rate_columns = [("learning rate of the matrices", "g"), ("tokens", ",.0f"), ("bits per byte", ".4f")]
    tables = {
        "ladder": ladder_table(ladder),
        "prediction": recording.table(columns, rows),
    }
    if figures.get("rates"):
        tables["rates"] = recording.table(rate_columns, figures["rates"])
    print(recording.save(design.result, figures, tables=tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("predict", "target", "rates"))
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-ladder", help="folder whose runs are used"
    )
    parser.add_argument("--layers", type=int, choices=tuple(DESIGNS), default=1, help="depth of all models (default 1)")
    options = parser.parse_args()
    design = DESIGNS[options.layers]
    options.out.mkdir(parents=True, exist_ok=True)
    # the record names the command by where this file lies
    sys.argv[0] = str(Path(sys.argv[0]).resolve())
    os.chdir(options.out)
    runs = Path("runs")
    ladder = train_ladder(design, runs)
    if options.part == "predict":
        found = predicted(design, ladder)
        values = {
            method: {
                "loss": one.loss,
                "interval": [one.interval.low, one.interval.high],
                "law": dict(vars(one.law.law)),
                "relative_flops": one.relative_flops,
            }
            for method, one in found.items()
        }
        target = {"width": design.target[0], "parameters": found["grid"].parameters, "tokens": found["grid"].tokens}
        save(design, {"predictions": values, "target": target, "epochs": epochs(design, runs, ladder[0].name)}, ladder)
        return
    figures = recording.load(design.result)["figures"]
    if options.part == "rates":
        figures["rates"] = tried_rates(design, runs)
        save(design, figures, ladder)
        return
    repeated = trained(
        members(RECIPE, [*design.overrides([design.repeated]), f"seed={','.join(map(str, SEEDS))}"], name="seeds"), runs
    )
    losses = [one.losses["bits_per_byte"] for one in repeated]
    figures["seeds"] = {"losses": losses, "mean": fmean(losses), "deviation": stdev(losses)}
    (target_run,) = trained(members(RECIPE, design.overrides([design.target]), name="target"), runs)
    figures["target"] |= {"bits_per_byte": target_run.losses["bits_per_byte"], "flops": target_run.flops}
    for one in figures["predictions"].values():
        one["difference"] = one["loss"] / target_run.losses["bits_per_byte"] - 1
    save(design, figures, ladder)


if __name__ == "__main__":
    main()
