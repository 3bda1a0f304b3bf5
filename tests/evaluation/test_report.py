"""The sections of evaluate and quantize."""

from pathlib import Path

from bessemer.core.report import Cell, StageReport
from bessemer.evaluation.report import (
    bits_per_byte_table,
    breakdown_tables,
    comparisons_table,
    key_figures,
    models_table,
    report,
    sentences,
)


def stage(**metrics) -> StageReport:
    return StageReport(name="evaluate", kind="evaluate", metrics=metrics, folder=Path())


def test_comparison_says_whether_its_interval_excludes_zero():
    one = {"metric": "rouge_l_held_out", "a": "sft", "b": "base", "difference": 0.2}
    table = comparisons_table([one | {"interval": [0.1, 0.3]}, one | {"interval": [-0.1, 0.3]}])
    assert [row[-1] for row in table.rows] == ["clear: the interval excludes 0", "no clear difference"]


def test_best_model_or_baseline_comes_first():
    table = bits_per_byte_table({"bits_per_byte": {"mine": 1.7}, "baselines": {"xz": 1.9, "witten_bell_5gram": 1.5}})
    assert [row[0] for row in table.rows] == [
        Cell("Witten–Bell 5-gram", remark="baseline"), Cell("mine", strong=True), Cell("xz −9", remark="baseline"),
    ]  # fmt: skip


def test_models_stand_side_by_side_with_what_is_no_memory():
    docs = {"asked_as": "chat", "n_held_out": 9, "exact_match_held_in": 0.9, "rouge_l_held_out": 0.3}
    tasks = {"docs": {"sft": docs}, "sums": {"sft": {"n": 9, "accuracy": 0.5}, "rl": {"n": 9, "accuracy": 0.75}}}
    table = models_table({"bits_per_byte": {"pretrain": 1.9, "sft": 2.0, "rl": 2.01}, "tasks": tasks})
    assert [column.heading for column in table.columns][2:] == ["Docs: ROUGE-L held out", "Sums: Accuracy"]
    assert [row[0].text for row in table.rows] == ["pretrain", "sft", "rl"]
    assert [row[-1] for row in table.rows] == ["–", "50.0 %", "75.0 %"]
    assert models_table({"bits_per_byte": {"pretrain": 1.9}, "tasks": tasks | {"docs": {}, "sums": {}}}) is None


def test_an_evaluation_that_measured_nothing_has_no_section():
    assert report(stage()) is None and sentences(stage()) == [] and key_figures(stage()) == []


def test_held_in_figures_are_called_memorised():
    scores = {"exact_match_held_in": 0.9, "exact_match_held_out": 0.1, "rouge_l_held_out": 0.3}
    found = stage(tasks={"docs": {"sft": scores}})
    assert "90% of the questions it was tuned on answered exactly (memorised)" in sentences(found)[0]
    assert key_figures(found)[0].note == "memorised"
    assert "held in (memorised)" in repr(report(found))


def test_bits_per_byte_are_shown_by_source_where_there_are_several():
    rows = [{"name": name, "bytes": 4000, "bits_per_byte": {"sft": value}} for name, value in (("books", 1.5), ("code", 1.0))]
    positions = [{"first": first, "bytes": 10, "bits_per_byte": {"sft": 2.0}} for first in (0, 16, 64)]
    by_source, by_position = breakdown_tables({"source": rows, "domain": rows[:1], "position": positions})
    assert [row[0] for row in by_source.rows] == ["books", "code"] and by_source.rows[1][2] == Cell("1.000", share=1 / 1.5)
    assert [row[0] for row in by_position.rows] == ["0 – 15", "16 – 63", "64 and more"]
