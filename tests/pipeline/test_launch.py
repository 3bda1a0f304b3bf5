"""One command, several processes: from text to a fine-tuned model, also when one of them dies on the way."""

import json
import os
import signal
import subprocess
import sys

import pytest

RECIPE = """
format: 1
name: two
collect: [{source: files, paths: texts.jsonl}]
tokenize: {algorithm: byte}
model: {preset: qwen3-1m, num_hidden_layers: 2, hidden_size: 32, intermediate_size: 48, max_position_embeddings: 64}
pretrain: {steps: 6, batch_size: 4, context_length: 32, dtype: float32, compile: false, evaluate_tokens: 512, sample_points: 0,
           threads: 1, checkpoint_minutes: 1.0e-9}
sft: {data: [questions.jsonl], steps: 4, batch_size: 4, context_length: 64, dtype: float32, compile: false, threads: 1}
"""

#: The same stages, by hand: two processes that each call the functions which the recipe's stages are.
BY_HAND = """
import sys
from pathlib import Path
import torch.distributed as dist
from bessemer.posttraining.config import SFTConfig
from bessemer.posttraining.sft import sft
from bessemer.training.config import PretrainConfig
from bessemer.training.pretrain import pretrain
import yaml_sections

out, made = Path(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo")
(out / "pretrain").mkdir(parents=True, exist_ok=True), (out / "sft").mkdir(parents=True, exist_ok=True)
pretrain(PretrainConfig(**yaml_sections.pretrain), made / "model/model", made / "tokenize/tokens", out / "pretrain", seed=0)
sft(SFTConfig(**yaml_sections.sft), out / "pretrain/model", None, out / "sft", seed=0, folder=Path())
"""

#: A user's loss that sends its process a signal once, in the third step of rank 1; files tell when, and when all went on.
STRUCK = """
import os, signal
from pathlib import Path
from bessemer.training.loss import next_token_loss

calls = []

def loss(model, batch):
    calls.append(1)
    if Path("struck").exists():
        Path("again").touch()
    elif os.environ.get("RANK") == "1" and len(calls) == 3:
        Path("struck").touch()
        os.kill(os.getpid(), signal.{signal})
    return next_token_loss(model, batch)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [
        {"id": n, "text": f"Number {n}: {'the cat sat on the mat and '[: 5 + n % 20]} counted {n * 7}. " * 6}
        for n in range(200)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    turns = [[("user", f"What is {n} plus one?"), ("assistant", str(n + 1))] for n in range(24)]
    lines = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def bessemer(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "bessemer", "run", "recipe.yaml", *arguments], capture_output=True, text=True, timeout=280
    )
    return done.returncode, done.stdout + done.stderr


def pause(folder):
    """Seconds from the signal until all train again: until the others have stopped, and their start."""
    return (folder / "again").stat().st_mtime - (folder / "struck").stat().st_mtime


def weights(stage_folder):
    return (stage_folder / "model" / "model.safetensors").read_bytes()


def test_two_processes_make_the_weights_of_stages_launched_by_hand(folder):
    code, said = bessemer("launch.processes=2")
    assert code == 0, said
    stages = folder / "runs" / "two-2" / "stages"
    sections = {"pretrain": RECIPE.split("pretrain: ")[1].split("sft:")[0], "sft": RECIPE.split("sft: ")[1]}
    from bessemer.pipeline.yaml_file import parse_value

    values = {name: parse_value(" ".join(text.split()), name) for name, text in sections.items()}
    (folder / "yaml_sections.py").write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))
    (folder / "by_hand.py").write_text(BY_HAND)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "by_hand.py", str(folder / "hand"), str(stages)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    for stage in ("pretrain", "sft"):
        manifest = json.loads((stages / stage / "manifest.json").read_text())
        assert manifest["metrics"]["processes"] == 2
        assert weights(stages / stage) == weights(folder / "hand" / stage)


@pytest.mark.slow
def test_inside_a_torchrun_the_same_command_makes_the_same(folder):
    code, said = bessemer("launch.processes=2", "--until", "pretrain", "--name", "launched")
    assert code == 0, said
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bessemer"]
    done = subprocess.run(
        [*torchrun, "run", "recipe.yaml", "--until", "pretrain", "--runs", "others"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    both = [folder / runs / name / "stages" / "pretrain" for runs, name in (("runs", "launched"), ("others", "two"))]
    assert weights(both[0]) == weights(both[1])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no kill -9")
def test_when_a_process_dies_all_start_again_and_go_on(folder):
    (folder / "mine.py").write_text(STRUCK.format(signal="SIGKILL"))
    code, said = bessemer("launch.processes=2", "pretrain.loss=mine.py:loss", "--until", "pretrain")
    assert code == 0, said
    assert "process 1 ended with signal 9; all are started again and go on from the last checkpoint" in said
    assert "going on from step 2 of 6" in said
    assert pause(folder) < 60


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="Windows stops no process")
def test_when_a_process_hangs_the_others_give_up_after_the_timeout_and_all_start_again(folder):
    (folder / "mine.py").write_text(STRUCK.format(signal="SIGSTOP"))
    arguments = ("pretrain.loss=mine.py:loss", "pretrain.parallel.timeout=10", "--until", "pretrain")
    code, said = bessemer("launch.processes=2", *arguments)
    assert code == 0, said
    assert "process 0 ended with exit code 1; all are started again and go on from the last checkpoint" in said
    assert "going on from step 2 of 6" in said
    assert 10 < pause(folder) < 10 + 60  # of which 30 s until the agent kills what does not end by itself


def test_a_mistake_is_one_line_and_not_tried_again(folder):
    code, said = bessemer("launch.processes=2", "pretrain.batch_size=3", "--until", "pretrain")
    assert code == 2
    assert "error: batch_size 3 is not divisible by the 2 ranks that read rows of their own" in said
    assert "Traceback" not in said and "started again" not in said
