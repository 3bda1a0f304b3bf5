"""A few drawn pictures as the files in which MMMU, ChartQA, DocVQA and POPE are published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.model.picture_files import drawn, encoded

PICTURES = [encoded(drawn(40 + 10 * seed, 30, seed=seed)) for seed in range(4)]


def in_struct(data: bytes, path: str = "") -> dict[str, Any]:
    """A picture as the library `datasets` stores it."""
    return {"bytes": data, "path": path}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], rows_a_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path, row_group_size=rows_a_group)
    return path


def write_json(path: Path, value: Any, lines: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value), encoding="utf-8")
    return path


def write_pictures(folder: Path, names: Sequence[str]) -> None:
    for name, data in zip(names, PICTURES, strict=False):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def mmmu_row(subject: str = "Art", number: int = 1, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": f"validation_{subject}_{number}",
        "question": "<image 1> Which of these is it?",
        "options": "['a pear', 'a plum', \"a man's hat\"]",
        "explanation": "",
        "question_type": "multiple-choice",
        "answer": "B",
        **{f"image_{place}": None for place in range(1, 8)},
    }
    return row | {"image_1": in_struct(PICTURES[number % 4])} | changes


def write_mmmu(folder: Path) -> Path:
    rows = [
        mmmu_row("Art", 1),
        mmmu_row("Art", 2, question="How does <image 1> differ from <image 2>?", image_2=in_struct(PICTURES[3])),
        mmmu_row("Art", 3, question="How many?", question_type="open", options="[]", answer="['12', 'twelve']"),
    ]
    write_parquet(folder / "Art" / "validation-00000-of-00001.parquet", rows)
    write_parquet(folder / "Art_Theory" / "validation-00000-of-00001.parquet", [mmmu_row("Art_Theory", 1, answer="A")])
    return folder


def chart_parquet(folder: Path) -> Path:
    kinds = ["human_test", "human_test", "augmented_test"]
    rows = [
        {"type": kind, "question": f"Which is {n}?", "answer": answer, "image": in_struct(PICTURES[n])}
        for n, (kind, answer) in enumerate(zip(kinds, ["14", "Yes", "0.5"], strict=True))
    ]
    return write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows).parents[1]


def chart_other_parquet(folder: Path) -> Path:
    """The other published form: `query`, a list of labels, bytes without a struct."""
    rows = [
        {"image": PICTURES[n], "query": f"Which is {n}?", "label": [answer], "human_or_machine": int(n == 2)}
        for n, answer in enumerate(["14", "Yes", "0.5"])
    ]
    return write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows).parents[1]


def chart_json(folder: Path) -> Path:
    """ChartQA's own folders."""
    write_pictures(folder / "test" / "png", ["a.png", "b.png", "c.png"])
    human = [{"imgname": f"{name}.png", "query": f"Which is {n}?", "label": answer} for n, (name, answer) in _CHARTS[:2]]
    other = [{"imgname": f"{name}.png", "query": f"Which is {n}?", "label": answer} for n, (name, answer) in _CHARTS[2:]]
    write_json(folder / "test" / "test_human.json", human)
    write_json(folder / "test" / "test_augmented.json", other)
    return folder


_CHARTS = list(enumerate([("a", "14"), ("b", "Yes"), ("c", "0.5")]))


def _pages() -> list[dict[str, Any]]:
    said = [(["Denver", "Denver, Colorado"], ["layout"]), (["12/15/88"], ["form", "table/list"])]
    return [
        {"questionId": 300 + n, "question": f"Where is {n}?", "question_types": types, "docId": n, "answers": answers}
        for n, (answers, types) in enumerate(said)
    ]


def doc_json(folder: Path) -> Path:
    """DocVQA's own folder."""
    write_pictures(folder / "documents", ["xnbl0037_1.png", "xnbl0037_2.png"])
    rows = [row | {"image": f"documents/xnbl0037_{n + 1}.png", "data_split": "val"} for n, row in enumerate(_pages())]
    write_json(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": rows})
    return folder


def doc_parquet(folder: Path) -> Path:
    rows = [row | {"questionId": str(row["questionId"]), "image": in_struct(PICTURES[n])} for n, row in enumerate(_pages())]
    return write_parquet(folder / "DocVQA" / "validation-00000-of-00001.parquet", rows).parent


def pope_json(folder: Path) -> Path:
    """POPE's files of JSON lines, and COCO's pictures in a folder of their own."""
    names = [f"COCO_val2014_{n:012}.png" for n in range(2)]
    write_pictures(folder / "val2014", names)
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n + 1, "image": names[n % 2], "text": f"Is there a {thing} in the image?", "label": label}
            for n, (thing, label) in enumerate([("cat", "yes"), ("dog", "no"), ("cup", "yes"), ("hat", "no")])
        ]
        write_json(folder / "coco" / f"coco_pope_{category}.json", rows, lines=True)
    return folder


def pope_parquet(folder: Path) -> Path:
    rows = [
        {"id": str(n), "question_id": str(n), "question": f"Is there a {n}?", "answer": label, "image_source": "x"}
        | {"image": in_struct(PICTURES[n]), "category": category}
        for n, (label, category) in enumerate([("yes", "random"), ("no", "popular"), ("yes", "adversarial")])
    ]
    return write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows).parents[1]


#: A task's name, and what writes its data into a folder and says where `--data` points.
FORMS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "mmmu": ("mmmu", write_mmmu),
    "chartqa, Parquet": ("chartqa", chart_parquet),
    "chartqa, Parquet with labels": ("chartqa", chart_other_parquet),
    "chartqa, JSON": ("chartqa", chart_json),
    "docvqa, JSON": ("docvqa", doc_json),
    "docvqa, Parquet": ("docvqa", doc_parquet),
    "pope, JSON lines": ("pope", pope_json),
    "pope, Parquet": ("pope", pope_parquet),
}
