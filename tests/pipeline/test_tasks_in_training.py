"""Tasks that a model is asked while it is trained: what is missing is said before any stage is made."""

import json
import re
from pathlib import Path

import pytest

from bessemer.cli.main import main

RECIPE = """
format: 1
name: asked
collect: [{source: files, paths: texts.jsonl}]
tokenize: {vocab_size: 300}
model: {preset: null, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}
pretrain: {steps: 1, tasks: [TASK]}
"""


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("arc_easy", "pretrain: .*arc_easy.jsonl"),
        ("arc_esy", "pretrain: there is no task 'arc_esy'; did you mean 'arc_easy'"),
        ("mine.yaml", "pretrain: .*mine.yaml"),
    ],
)
def test_a_task_without_data_ends_a_run_before_its_first_stage(task, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text(json.dumps({"text": "Steel is an alloy of iron and carbon."}) + "\n", encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE.replace("TASK", task), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["run", "recipe.yaml"])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "pretrain" in line]
    assert re.search(message, line)
    assert not list(Path("runs").glob(".store/*-*/manifest.json"))
