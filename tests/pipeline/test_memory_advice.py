"""A stage that trains and finds no memory ends in one line that says what would fit."""

import json
import sys

import pytest

from bessemer.cli.main import main

resource = pytest.importorskip("resource", reason="Windows sets no limits")

RECIPE = """
format: 1
name: large
collect: [{source: files, paths: texts.jsonl}]
tokenize: {algorithm: byte}
model: {preset: qwen3-1m, num_hidden_layers: 2, hidden_size: 64, intermediate_size: 256, max_position_embeddings: 4096}
pretrain: {steps: 3, batch_size: 64, context_length: 64, dtype: float32, compile: false, evaluate_tokens: 512, sample_points: 0,
           threads: 1, checkpoint_minutes: 1.0e-9, loss: mine.py:loss}
"""

#: A user's loss that wants far more than the address space in the second step.
GREEDY = """
import resource, torch
from bessemer.training.objectives import next_token_loss

calls = []

def loss(model, batch):
    calls.append(1)
    if len(calls) == 2:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
        torch.empty(1 << 30)
    return next_token_loss(model, batch)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on addresses is Linux's")
def test_it_is_one_line_with_what_would_fit_and_the_checkpoint_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [
        {"id": n, "text": f"Number {n}: {'the cat sat on the mat and ' * (n % 7)} counted {n * 7}. " * 6} for n in range(300)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "mine.py").write_text(GREEDY, encoding="utf-8")
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with pytest.raises(SystemExit, match="2"):
            main(["run", "recipe.yaml", "--allow-code"])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: out of memory while it asked for 4.3 GB more; micro_batch_size: ")
    assert "with activation_checkpointing: " in last and "the checkpoint of step 1 is kept" in last
    assert "Traceback" not in said
    (partial,) = (tmp_path / "runs" / ".store").glob("pretrain-*.partial")
    assert [path.name for path in (partial / "checkpoints").iterdir()] == ["step-000001"]
