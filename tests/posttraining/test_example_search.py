"""Which rows of examples hold a sequence of words."""

from __future__ import annotations

import json

from bessemer.posttraining.data.search import ExampleFile, example_passages

ROWS = [
    {"messages": [{"role": "user", "content": "What melts?"}, {"role": "assistant", "content": "Iron melts in the furnace."}]},
    {"prompt": "What rusts?", "chosen": "Iron rusts.", "rejected": "All iron melts in the rain."},
]


def test_rows_with_the_longest_ending_come_first_and_say_where_it_stands(tmp_path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"cut', encoding="utf-8")
    table = tmp_path / "more.csv"
    table.write_text("prompt,completion\nWhat?,It melts in the rain\n", encoding="utf-8")
    files = [
        ExampleFile("sft", "sft", lines, is_split=True),
        ExampleFile("align", "preference", table),
        ExampleFile("x", "sft", tmp_path / "no"),
    ]
    found, rows = example_passages(files, ["iron melts in the rain", "melts in the rain", "in the rain", "rain"])
    assert rows == 3
    assert [(one.file.stage, one.row, one.part, one.left, one.found, one.needle) for one in found] == [
        ("sft", 2, "rejected", "All ", "iron melts in the rain", 0),
        ("align", 2, "completion", "It ", "melts in the rain", 1),
    ]
    assert example_passages(files, ["furnace"])[0][0].part == "messages"
