"""What thinking is worth to a small model: right answers by thinking budget, before and after rewards.

    python benchmarks/reasoning.py [--out FOLDER] [--recipes FOLDER]

The models of `examples/reasoning`: tuned on worked sums, then rewarded for right answers; and both without thinking. Sums that
are held out are asked greedily, at each budget. What is finished in the folder is not done again. Result: `reasoning.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import bessemer.pipeline.api
import recording
from bessemer.core.progress import PlainLines
from bessemer.inference.engine import Engine

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/posttraining",
    "src/bessemer/training",
    "src/bessemer/model",
    "src/bessemer/inference",
    "src/bessemer/evaluation",
    "examples/reasoning",
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "reasoning"
ITEMS = 500
#: Titles of the models, each with its recipe and its stage.
MODELS = {
    "thinks, after worked sums": ("recipe.yaml", "sft"),
    "thinks, after rewards too": ("recipe.yaml", "rl"),
    "answers at once, after the same sums": ("direct.yaml", "sft"),
    "answers at once, after rewards too": ("direct.yaml", "rl"),
}


def by_budget(model: Path, *, thinks: bool) -> dict[str, dict[str, float]]:
    """Share of right answers and mean tokens of an answer, by budget; of a model that never thinks, without one."""
    path = EXAMPLE / "budgets.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    budgets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(budgets)
    found = {}
    with Engine(model) as engine:
        for budget in budgets.BUDGETS if thinks else budgets.BUDGETS[-1:]:
            accuracy, tokens = budgets.accuracy(engine, budget, ITEMS)
            found[str(budget)] = {"accuracy": accuracy, "tokens": tokens}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reasoning"), help="folder of the runs")
    parser.add_argument("--recipes", type=Path, default=EXAMPLE, help="folder of the recipes")
    arguments = parser.parse_args()
    models: dict[str, dict[str, dict[str, float]]] = {}
    minutes: dict[str, float] = {}
    for title, (recipe, stage) in MODELS.items():
        made = bessemer.pipeline.api.run(
            str(arguments.recipes / recipe),
            {"rl.tasks": []},
            runs=arguments.out,
            allow_code=True,
            progress=PlainLines(interval=30),
        )
        minutes[Path(recipe).stem] = sum(one.artefact.manifest["seconds"] for one in made.made) / 60
        models[title] = by_budget(made.folder / "stages" / stage / "model", thinks=recipe == "recipe.yaml")
    budgets = list(models[next(iter(MODELS))])
    rows = [
        [title, *(of_budget.get(budget, {}).get("accuracy") for budget in budgets), of_budget[budgets[-1]]["tokens"]]
        for title, of_budget in models.items()
    ]
    figures: dict[str, Any] = {"models": models, "minutes": minutes}
    columns = [("", ""), *((budget, ".1%") for budget in budgets[:-1]), ("no limit", ".1%"), ("tokens then", ".1f")]
    print(json.dumps(figures), flush=True)
    recording.save("reasoning", figures, tables={"budgets": recording.table(columns, rows)}, peers=["torch"])


if __name__ == "__main__":
    main()
