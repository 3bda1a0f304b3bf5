"""The section of the model stage, and what is said of the model."""

from pathlib import Path

from bessemer.core.report import Cell, RunReport, StageReport
from bessemer.model.specs import layers_table, sentences


def model_stage(parameters, **others):
    """The model stage of a run with `others`: kind to metrics."""
    stages = []
    run = RunReport(name="r", folder=Path(), stages=stages)
    metrics = {"model": {"parameters": parameters}} | others
    stages += [StageReport(name=kind, kind=kind, metrics=found, folder=Path(), run=run) for kind, found in metrics.items()]
    return stages[0]


def test_bars_of_parts_are_shares_of_all_parameters():
    layers = [{"part": "embedding", "count": 1, "shapes": [[4, 2]], "parameters": 30}]
    layers += [{"part": "norms", "count": 2, "shapes": [[3], [3, 5]], "parameters": 10}]
    assert layers_table(layers).rows == [
        ("embedding", "1", "4 × 2", Cell("30", share=0.75)), ("norms", "2", "3, 3 × 5", Cell("10", share=0.25)),
    ]  # fmt: skip


def test_the_tokens_of_all_pretrainings_are_counted():
    stage = model_stage(200_000_000, pretrain={"tokens": 5_000})
    extra = StageReport(name="pretrain_2", kind="pretrain", metrics={"tokens": 7_000}, folder=Path())
    stage.run.stages.append(extra)
    assert sentences(stage) == ["Model: 200,000,000 parameters, trained on 12,000 tokens."]


def test_a_small_model_is_said_to_know_no_facts():
    assert "answer questions reliably" in sentences(model_stage(1_000_000))[1]
    assert "answer anything else reliably" in sentences(model_stage(1_000_000, sft={}))[1]
