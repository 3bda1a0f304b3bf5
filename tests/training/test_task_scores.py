"""Tasks that a model answers while it is trained."""

import pytest

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.core.progress import Silent
from bessemer.core.records import json_lines
from bessemer.evaluation.tasks import evaluate_tasks
from bessemer.inference.engine import Engine
from bessemer.model.config import ModelConfig
from bessemer.pipeline.stages import open_tasks
from bessemer.tasks.registry import read_task
from bessemer.training.config import LoopConfig
from bessemer.training.monitoring.run_metrics import Throughput, check_processes
from bessemer.training.pretrain import pretrain
from bessemer.training.report import task_accuracies
from tests.tasks.written import ANIMALS, write_task

SUMS = [{"context": f"{number} + 1 =", "answer": str(number + 1)} for number in range(3)]


@pytest.fixture
def config(settings, tmp_path):
    """Two tasks, one of them by samples, asked after steps 2, 4, 5."""
    write_task(tmp_path, ANIMALS, name="animals", kind="choice")
    write_task(tmp_path, SUMS, name="sums", kind="generate", answers=["answer"], max_tokens=2, temperature=1.0, samples=2)
    return settings.with_changes(
        steps=5, tasks=["animals.yaml", "sums.yaml"], tasks_every=2, tasks_limit=2, sample_points=0, evaluate_every=5,
        evaluate_tokens=200, checkpoint_minutes=1e-9, diagnostics_every=0, learning_rate=0.02,
    )  # fmt: skip


def trained(config, model_folder, tokenized, out, folder, **options):
    out.mkdir(exist_ok=True)
    given = {"seed": 3, "device": "cpu", "folder": folder, "tasks": open_tasks, **options}
    pretrain(config, model_folder, tokenized / "tokens", out, **given)
    records = read_metrics(out / "metrics.jsonl")
    return (out / "model" / "model.safetensors").read_bytes(), {
        record["step"]: {name: value for name, value in record.items() if "task" in name} for record in records
    }


def test_accuracies_are_those_of_an_evaluation_and_no_weight_changes(config, model_folder, tokenized, tmp_path, monkeypatch):
    plain, _ = trained(config.with_changes(tasks=[]), model_folder, tokenized, tmp_path / "plain", tmp_path)
    weights, found = trained(config, model_folder, tokenized, tmp_path / "asked", tmp_path)
    assert weights == plain
    assert [step for step, accuracies in found.items() if accuracies] == [2, 4, 5]
    tasks = [read_task(tmp_path / f"{name}.yaml") for name in ("animals", "sums")]
    with Engine(tmp_path / "asked" / "model", device="cpu") as engine:
        results = evaluate_tasks(engine, tasks[:1], tmp_path / "evaluated", model={}, progress=Silent())["tasks"]
        right = [item["score"] for item in json_lines((tmp_path / "evaluated" / "items.jsonl").read_text(encoding="utf-8"))]
    assert results["animals"]["n"] == 3
    assert found[5] == {"task/animals": sum(right[:2]) / 2, "task/sums": found[5]["task/sums"]}

    def stop(finished, *_):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(
            "bessemer.training.pretrain._PeriodicEvaluation.__call__", lambda self, step, _: {} if step < 3 else stop(step)
        )
        with pytest.raises(InterruptedError):
            trained(config, model_folder, tokenized, tmp_path / "stopped", tmp_path)
    assert trained(config, model_folder, tokenized, tmp_path / "stopped", tmp_path) == (weights, found)


def test_missing_data_and_what_is_no_task_are_said_before_training(config, model_folder, tokenized, tmp_path):
    (tmp_path / "animals.jsonl").unlink()
    with pytest.raises(ArtefactError, match=r"animals\.jsonl"):
        trained(config, model_folder, tokenized, tmp_path / "out", tmp_path)
    with pytest.raises(ConfigError, match="there is no task 'arc_esy'; did you mean 'arc_easy'"):
        trained(config.with_changes(tasks=["arc_esy"]), model_folder, tokenized, tmp_path / "out", tmp_path)
    with pytest.raises(ConfigError, match="no function that asks them"):
        trained(config, model_folder, tokenized, tmp_path / "out", tmp_path, tasks=None)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match="asked of a model in one process, and 2 train this one"):
        check_processes(2)


def test_a_conversation_without_a_chat_template_is_said_before_training(config, model_folder, tokenized, tmp_path, monkeypatch):
    write_task(tmp_path, SUMS, name="sums", kind="generate", answers=["answer"], chat=True)
    monkeypatch.setattr(
        "bessemer.tokenization.tokenizer.Tokenizer.apply_chat_template",
        lambda *_, **__: (_ for _ in ()).throw(ConfigError("it has no chat template")),
    )
    with pytest.raises(ConfigError, match="tasks: sums: it has no chat template"):
        trained(config, model_folder, tokenized, tmp_path / "out", tmp_path)
    assert not list((tmp_path / "out").iterdir())


def test_the_line_shows_the_accuracy_or_the_mean_of_several():
    throughput = Throughput(LoopConfig(), ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1), 1e12)
    throughput.add_step(1024, 1.0, 0.0)
    assert throughput.progress_line({"loss": 3.0, "task/arc": 0.25}).startswith("loss 3.000 · 25.0% arc · 1,024 tokens/s")
    assert " · 37.5% of 2 tasks · " in throughput.progress_line({"loss": 3.0, "task/arc": 0.25, "task/piqa": 0.5})


def test_few_tasks_are_curves_and_many_a_table():
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "task/arc": 0.25}, {"step": 4, "task/arc": 0.5, "task/piqa": 0.625}]
    (curves,) = task_accuracies(records)
    assert [(series.label, series.points()) for series in curves.series] == [
        ("arc", ([2, 4], [25.0, 50.0])),
        ("piqa", ([4], [62.5])),
    ]
    many = [{"step": step} | {f"task/{name}": 0.1 * step for name in "abcde"} for step in (1, 2)]
    _, table = task_accuracies(many)
    assert table.rows[0] == ("a", "10.0", "20.0")
    assert task_accuracies(records[:1]) == []
