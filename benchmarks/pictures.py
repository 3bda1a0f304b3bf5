"""Does a small model learn to see? Drawn pictures that it never saw, and handwritten digits, from a decoder without eyes.

    python benchmarks/pictures.py                  # a quarter of an hour of one core
    python benchmarks/pictures.py --runs FOLDER    # keep the runs there; what has been made is not made again

The recipe `pictures` makes a decoder, an encoder and a projector with random weights, and trains them on questions about drawn
pictures: the shape, the colour and the place of a thing, how many there are, a written word. Asked are questions about pictures
of another seed, none of which is among those of training (the hashes of their files say so); and the same questions with grey
in place of the pictures, whose answers the words of a question alone decide: chance and at most 5 points.

Digits: the 1,797 pictures of 8 × 8 pixels that scikit-learn ships, of which one in five is held out. The others, each also
moved by a pixel up, down, left and right, are files beside a table of two columns, which `finetune` takes; the model is the
recipe's. Needs scikit-learn's files, and not the package itself.

Nothing is timed to compare, so other work may run; the minutes are of the process. Result: `pictures.json`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.core.hashing import derive_seed, hash_value  # noqa: E402
from bessemer.core.progress import progress_for_terminal  # noqa: E402
from bessemer.evaluation.task_answerers import answers  # noqa: E402
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams  # noqa: E402
from bessemer.model.formats import ModelSource  # noqa: E402
from bessemer.model.vision.pictures import Picture  # noqa: E402
from bessemer.pipeline.api import run  # noqa: E402
from bessemer.posttraining.data.picture_rows import QUESTION, sources_in  # noqa: E402
from bessemer.posttraining.sft.config import FinetuneConfig  # noqa: E402
from bessemer.posttraining.sft.finetune import finetune  # noqa: E402
from bessemer.tasks.config import TaskOptions  # noqa: E402
from bessemer.tasks.drawn import ANSWERS, QUESTIONS, png_of  # noqa: E402
from bessemer.tasks.registry import find_tasks  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/model/vision",
    "src/bessemer/tasks/drawn.py",
    "src/bessemer/tasks/drawn_task.py",
    "src/bessemer/posttraining/sft",
    "src/bessemer/training",
    "src/bessemer/recipes/pictures.yaml",
)

#: Seed of the tasks, and how many pictures the recipe's stages train on at most.
SEED, TRAINED = 1234, 24_000
#: One digit in so many is held out; passes over the others; places of a digit beside its own, in pixels down and right.
EVERY, EPOCHS, MOVES = 5, 6.0, ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
ASKED = {"drawn pictures": 0.9, "digits": 0.97, "blind above chance": 0.05}


def scores(engine: Engine, task_name: str) -> dict[str, Any]:
    """The accuracy of a model on a task, in all and by kind of question, and the number of its items."""
    (task,) = find_tasks([task_name])
    questions = task.questions()
    outcomes = [outcome for batch in answers(engine, task, questions) for outcome in batch]
    names = ["accuracy", *(f"accuracy_{kind}" for kind in QUESTIONS)]
    found = {name: [outcome.scores[name] for outcome in outcomes if name in outcome.scores] for name in names}
    return {"items": len(outcomes), "chance": task.chance, **{name: float(np.mean(values)) for name, values in found.items()}}


def pictures_in_both() -> int:
    """How many pictures of the evaluation are among those of training."""
    trained, held_out = (
        pictures_of(name, limit) for name, limit in (("drawn_pictures", TRAINED), ("drawn_pictures_held_out", None))
    )
    return len(trained & held_out)


def pictures_of(task_name: str, limit: int | None) -> set[str]:
    """The hashes of the pictures of a task."""
    (task,) = find_tasks([task_name], TaskOptions(limit=limit))
    return {hash_value(sources_in(question.context)) for question in task.questions()}


def digits() -> tuple[np.ndarray, np.ndarray, str]:
    """The pictures, (N, 8, 8, 3) uint8, what each is, (N,), and the package's version."""
    try:
        package = metadata.distribution("scikit-learn")
        with gzip.open(Path(str(package.locate_file("sklearn/datasets/data/digits.csv.gz"))), "rt") as stream:
            table = np.array([[float(cell) for cell in row] for row in csv.reader(stream)])
    except (metadata.PackageNotFoundError, OSError):
        recording.not_run("scikit-learn's digits are not here: pip install scikit-learn")
    grey = (table[:, :64].reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1), table[:, 64].astype(int), package.version


def moved(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """A picture in its own place and a pixel beside it, black where nothing was."""
    for down, right in MOVES:
        padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
        yield padded[1 - down : 9 - down, 1 - right : 9 - right]


def learn_digits(model: Path, folder: Path) -> dict[str, Any]:
    """Fine-tune a model on a table of files, and ask it for the digits that are held out."""
    pixels, labels, version = digits()
    is_held_out = np.random.default_rng(derive_seed(SEED, "digits")).permutation(len(labels)) % EVERY == 0
    (folder / "files").mkdir(parents=True, exist_ok=True)
    with (folder / "digits.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["image", "label"])
        for number in np.flatnonzero(~is_held_out).tolist():
            for place, one in enumerate(moved(pixels[number])):
                name = f"files/{number}-{place}.png"
                (folder / name).write_bytes(png_of(np.ascontiguousarray(one)))
                rows.writerow([name, str(labels[number])])
    config = FinetuneConfig.parse(
        {"method": "full", "epochs": EPOCHS, "learning_rate": 1e-3, "batch_size": 12, "context_length": 96, "general": []}
        | {"held_out": 0.02, "base_dtype": "float32"},
        "finetune",
    )
    data = str((folder / "digits.csv").resolve())
    # the time that PyTorch computes in, whatever else runs
    started = time.process_time()
    finetune(
        config, ModelSource("folder", str(model)), data, folder / "out", seed=7, device="cpu", progress=progress_for_terminal()
    )
    minutes = (time.process_time() - started) / 60
    engine = Engine(folder / "out" / "model", device="cpu", config=EngineConfig(kv_memory=0.05))
    held_out = np.flatnonzero(is_held_out)
    prompts = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": Picture.of(pixels[number])}, {"type": "text", "text": QUESTION}],
            }
        ]
        for number in held_out.tolist()
    ]
    params = SamplingParams(max_tokens=4, temperature=0.0)
    said = [engine.chat(prompt, params).text.strip() for prompt in prompts]
    right = [answer == str(label) for answer, label in zip(said, labels[held_out], strict=True)]
    return {
        "trained": int((~is_held_out).sum()),
        "items": len(right),
        "accuracy": float(np.mean(right)),
        "processor_minutes": minutes,
        "scikit_learn": version,
    }


def main() -> None:
    """Run the benchmark and record its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder in which the runs stay; none: a temporary one")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = chosen.runs or Path(scratch)
        made = run("pictures", runs=runs, progress=progress_for_terminal())
        seconds = {one.stage.name: one.artefact.manifest["seconds"] for one in made.made}
        model = (runs / "pictures" / "model").resolve()
        engine = Engine(model, device="cpu", config=EngineConfig(kv_memory=0.05))
        drawn = scores(engine, "drawn_pictures_held_out")
        blind = scores(engine, "drawn_pictures_blind")
        both = pictures_in_both()
        written = learn_digits(model, runs / "digits")
    figures = {
        "drawn": drawn,
        "blind": blind,
        "blind_above_chance": blind["accuracy"] - blind["chance"],
        "pictures_in_both": both,
        "digits": written,
        "stage_seconds": seconds,
        "asked": ASKED,
        "holds": {
            "drawn pictures": drawn["accuracy"] >= ASKED["drawn pictures"] and not both,
            "blind": blind["accuracy"] - blind["chance"] <= ASKED["blind above chance"],
            "digits": written["accuracy"] >= ASKED["digits"],
        },
    }
    kinds = [[kind, drawn[f"accuracy_{kind}"], blind[f"accuracy_{kind}"], 1 / len(ANSWERS[kind])] for kind in QUESTIONS]
    rows = [*kinds, ["all", drawn["accuracy"], blind["accuracy"], drawn["chance"]]]
    columns = [("question", ""), ("right", ".1%"), ("right without pictures", ".1%"), ("chance", ".1%")]
    tables = {
        "drawn": recording.table(columns, rows),
        "digits": recording.table(
            [("digits", ",d"), ("held out", ",d"), ("right", ".1%")],
            [[written["trained"], written["items"], written["accuracy"]]],
        ),
    }
    print(figures)
    print(recording.save("pictures", figures, tables=tables))


if __name__ == "__main__":
    main()
