"""What is gathered of a run: the functions of its stages' kinds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bessemer.core.config import Config
from bessemer.core.report import Facts, KeyFigure, RunReport, Section, StageReport, Text
from bessemer.core.stage import StageSpec
from bessemer.pipeline.report import gather, next_steps, sections, sentences
from bessemer.pipeline.stages import STAGES
from tests.views.sample_run import run_of, sample_metrics, sample_records, write_run

METRICS = {
    "model": {"parameters": 1_000_000},
    "pretrain": {"tokens": 5_000},
    "evaluate": {"bits_per_byte": {"pretrain": 1.5}, "baselines": {"xz": 2.0}},
}


def run_report(metrics: dict[str, dict], folder: Path = Path("nowhere")) -> RunReport:
    stages: list[StageReport] = []
    run = RunReport(name="r", folder=folder, stages=stages)
    stages += [StageReport(name=name, kind=name, metrics=found, folder=folder, run=run) for name, found in metrics.items()]
    return run


def test_a_run_is_said_to_have_what_its_recipe_made():
    text = " ".join(sentences(run_report(METRICS)))
    assert "Bits per byte on text held out of training, lower is better: pretrain 1.500 (beside it" in text
    assert "package" not in text and "tuned" not in text
    assert "answers the questions that it was tuned on" in " ".join(sentences(run_report(METRICS | {"sft": {}})))


def test_a_stage_of_an_unknown_kind_is_reported_by_its_figures():
    (section,) = sections(run_report({"count_words": {"words": 3}}))
    assert section.title == "Count words" and section.parts == [Facts({"words": 3})]


def test_a_stage_says_by_its_spec_what_is_reported(tmp_path, monkeypatch):
    spec = StageSpec(
        "count_words",
        "Count words.",
        Config,
        1,
        {},
        {},
        run=lambda context: {},
        report=lambda stage: Section("Words", [Text("counted")], headline=True),
        summary_line=lambda metrics: f"{metrics['words']} words",
        sentences=lambda stage: ["It is short."],
        key_figures=lambda stage: [KeyFigure(value="3", label="words")],
        next_steps=lambda stage: ["wc"],
    )
    monkeypatch.setitem(STAGES, "count_words", spec)
    found = gather(write_run(tmp_path, {"count_words": {"words": 3}}))
    assert [section.title for section in found.sections] == ["Words"] and found.stages[0].summary == "3 words"
    assert (found.sentences, found.figures[0].label) == (["It is short."], "words")
    assert found.next_steps == ["wc", "bessemer show quickstart"]


def test_next_steps_begin_with_those_of_the_last_stage(tmp_path):
    (tmp_path / "model").mkdir()
    commands = next_steps(run_report({"model": {}, "pretrain": {}, "sft": {}}, tmp_path))
    assert [command.split()[1] for command in commands] == ["chat", "serve", "generate", "show"]
    assert [command.split()[1] for command in next_steps(run_report({"collect": {}}, tmp_path))] == ["show"]


def test_a_whole_run_is_gathered_in_the_order_of_its_recipe():
    found = run_of(sample_metrics(), sample_records())
    titles = ["Data", "Tokenizer", "Model", "Pretraining", "Fine-tuning", "Evaluation", "Quantisation", "Red team"]
    assert [section.title for section in found.sections] == titles
    assert [(figure.value, figure.label) for figure in found.figures] == [
        ("21.4 MB", "of clean text"), ("1.31M", "parameters"), ("1.503", "bits per byte, held out"),
        ("96%", "of its own questions"), ("50%", "attack success"), ("12%", "over-refusal"),
    ]  # fmt: skip
    assert {stage.name: stage.summary for stage in found.stages} == {
        "collect": "63,412 documents",
        "clean": "63,120 documents, 292 dropped",
        "deduplicate": "58,018 documents, 5,102 dropped",
        "select": "51,204 documents, 6,814 dropped",
        "tokenize": "4,096 tokens, 3.31 bytes each",
        "model": "1,311,104 parameters",
        "pretrain": "1,700 steps",
        "sft": "300 steps",
        "evaluate": "2 models measured",
        "quantize": "int8, 1.3 MB of weights",
        "redteam": "25 attempts, 75 queries",
    }


def test_a_stage_that_is_not_there_yet_is_left_out(tmp_path):
    found = gather(write_run(tmp_path, {"model": {"parameters": 10}}))
    assert [section.title for section in found.sections] == ["Model"] and len(found.stages) == 1


def test_gathering_imports_nothing_heavy_and_nothing_that_draws():
    heavy = ("torch", "pyarrow", "daft", "numba", "matplotlib", "rich", "markupsafe")
    code = f"import sys, bessemer.pipeline.report; sys.exit(' '.join(name for name in {heavy} if name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False).stderr.strip() == ""
