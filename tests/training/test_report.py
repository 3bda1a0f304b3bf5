"""The sections of methods of training: curves and diagnostics."""

import math

from bessemer.core.report import Curves, Facts, Heading, HeatMaps, RunReport, StageReport, Table, Text
from bessemer.training.report import (
    diagnostics,
    layers_map,
    losses_by_source,
    next_steps,
    report,
    sentences,
    training_curves,
)


def records(steps=(100, 200), layers=2):
    """Lines of steps with diagnostics, and one without."""
    lines = [{"step": 1, "loss": 3.0, "mfu": 0.2}]
    for step in steps:
        line = {"step": step, "loss": 2.0, "mfu": 0.3, "peak_memory_bytes": 2_000_000_000, "loss/web": 2.5, "loss/code": 1.5}
        for layer in range(layers):
            line |= {f"gradient_norm/layers.{layer}/attention": 3.0, f"gradient_norm/layers.{layer}/norms": 4.0 * step}
            line |= {f"update_ratio/layers.{layer}/attention": 0.5, f"weight_norm/layers.{layer}/attention": 3.0}
            line |= {f"update_ratio/layers.{layer}/norms": 1.0, f"weight_norm/layers.{layer}/norms": 4.0}
            line |= {f"activation_outlier/layers.{layer}": 7.0 + layer}
        lines.append(line | {"gradient_norm/embedding": 1.0, "gradient_norm/final_norm": 0.0})
    return lines


def cells(found):
    """A heat map's numbers by row and step."""
    rows = zip(found.row_names, found.values, strict=True)
    return {(row, step): value for row, values in rows for step, value in zip(found.column_names, values, strict=True)}


def titles(parts):
    """Of the curves and heat maps, in order."""
    maps = [one.title for part in parts if isinstance(part, HeatMaps) for one in part.maps]
    return [part.title for part in parts if isinstance(part, Curves)] + maps


def test_curves_of_training_are_known_by_the_ends_of_their_keys():
    lines = [
        {"step": 1, "loss": 3.0, "learning_rate": 1e-3, "tokens_per_second": 90, "validation_bits_per_byte": 2.0},
        {"step": 2, "loss": 2.0, "learning_rate": 1e-3, "tokens_per_second": 90},
    ]
    bits, losses, rates, speeds = training_curves(lines, {"xz −9": 1.8})
    assert [series.label for series in bits.series] == ["validation"] and bits.baselines == {"xz −9": 1.8}
    assert losses.series[0].points() == ([1, 2], [3.0, 2.0])
    assert [one.title for one in (bits, losses, rates, speeds)] == [
        "Bits per byte of held-out text", "Loss, nats per token", "Learning rate", "Tokens per second",
    ]  # fmt: skip


def test_the_roles_of_a_layer_are_one_norm():
    found = cells(layers_map(records()[1:], "gradient_norm", title="t"))
    assert found["layer 1", "200"] == math.hypot(3.0, 800.0)
    assert found["embedding", "100"] == 1.0 and found["final norm", "100"] == 0.0


def test_ratios_of_roles_are_joined_by_the_weights_that_they_are_of():
    found = cells(layers_map(records()[1:], "update_ratio", title="t", weights="weight_norm"))
    assert found["layer 0", "100"] == math.hypot(0.5 * 3, 1.0 * 4) / 5


def test_a_long_run_is_thinned_to_columns_that_keep_the_first_and_the_last():
    found = layers_map(records(range(10, 1010, 10))[1:], "gradient_norm", title="t")
    assert len(found.column_names) == 24 and {"10", "1000"} <= set(found.column_names)


def test_few_sources_are_curves_and_many_a_table():
    (few,) = losses_by_source(records()[1:])
    assert [series.label for series in few.series] == ["web", "code"]
    many = [{"step": 1} | {f"loss/{number}": 2.0 + number for number in range(9)}, {"step": 2, "loss/3": 1.25}]
    heading, table = losses_by_source(many)
    assert isinstance(heading, Heading) and isinstance(table, Table)
    assert ("3", "5.000", "1.250") in table.rows
    assert losses_by_source([{"step": 1, "loss/only": 2.0}]) == []


def test_diagnostics_show_every_kind():
    assert titles(diagnostics(records())) == [
        "Loss by source, nats per token", "Share of the peak (MFU), %", "Most memory so far, GB",
        "Norm of the gradient, before clipping", "Update over weights, ‖Δw‖ / ‖w‖",
        "Largest activation over the root mean square",
    ]  # fmt: skip


def test_a_run_without_diagnostics_has_no_such_part():
    assert diagnostics([{"step": 1, "loss": 3.0}]) == []
    assert diagnostics([]) == []


def test_the_section_names_an_instance_of_the_stage_and_reads_its_samples(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "prompt": "The", "text": " end"}\n', encoding="utf-8")
    stage = StageReport(name="pretrain_2", kind="pretrain", metrics={"steps": 3}, folder=tmp_path)
    section = report(stage)
    assert section.title == "Pretraining: pretrain_2"
    assert section.parts[-1].samples[0].text == " end"
    assert Facts({"steps": 3}) in section.parts


def stage_with_sample(tmp_path, metrics, **of_others):
    lines = [
        '{"step": 1, "prompt": "The", "text": " dog"}',
        '{"step": 3, "prompt": "The\\nkey", "text": " is", "held_out": true}',
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = RunReport(name="r", folder=tmp_path, stages=(stages := []))
    stages += [
        StageReport(name=name, kind=name, metrics=found, folder=tmp_path, run=run)
        for name, found in {"pretrain": metrics, **of_others}.items()
    ]
    return stages[0]


def test_a_run_ends_with_bits_per_byte_and_what_became_of_a_held_out_text(tmp_path):
    stage = stage_with_sample(tmp_path, {"steps": 3, "bits_per_byte": 1.25, "training_bytes": 10**6})
    bits, sample = sentences(stage)
    assert bits.endswith("pretrain 1.250.") and sample.endswith(":\n  The\n  key▸ is")
    assert next_steps(stage)[-1].endswith("/pretrain/model The --temperature 0.7")


def test_what_later_stages_say_is_not_said_twice(tmp_path):
    stage = stage_with_sample(tmp_path, {"steps": 3, "bits_per_byte": 1.25}, sft={"steps": 2}, evaluate={"bits_per_byte": {}})
    assert sentences(stage) == []


def test_too_little_text_is_said_of_a_new_model_alone(tmp_path):
    metrics = {"steps": 3, "training_bytes": 120_000}
    (first, _) = sentences(stage_with_sample(tmp_path, metrics))
    assert first.startswith("120 kB of text are too little") and "--from smollm2" in first
    assert len(sentences(stage_with_sample(tmp_path, metrics, model={"init_from": "base"}))) == 1


def test_curves_stand_beside_the_baselines_of_the_runs_evaluation(tmp_path):
    stages = []
    run = RunReport(name="r", folder=tmp_path, stages=stages)
    stage = StageReport(name="pretrain", kind="pretrain", metrics={}, folder=tmp_path, run=run)
    baselines = {"baselines": {"xz": 1.8}}
    stages += [stage, StageReport(name="evaluate", kind="evaluate", metrics=baselines, folder=tmp_path, run=run)]
    lead, bits, *_ = report(stage).parts
    assert isinstance(lead, Text) and bits.baselines == {"xz −9": 1.8}
