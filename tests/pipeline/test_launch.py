"""One command, several processes: from text to a fine-tuned model, also when one of them dies on the way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from bessemer.cli.main import main
from bessemer.core.metrics import METRICS, read_metrics
from bessemer.distributed.layout import ParallelConfig
from bessemer.pipeline import worker
from bessemer.pipeline.api import run
from bessemer.pipeline.recipe import load_recipe
from bessemer.posttraining.sft.stage import sft
from bessemer.training.pretrain import pretrain
from tests.distributed.pool import pool_of, quick_processes

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

#: A user's loss that sends its process a signal once, in the third step of rank 1; files tell when, and when all went on.
STRUCK = """
import os, signal
from pathlib import Path
from bessemer.training.objectives import next_token_loss

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


two = pool_of(2, "module")

#: A user's loss that tells each process's setting of cuBLAS.
TELLING = """
import os
from pathlib import Path
from bessemer.training.objectives import next_token_loss

def loss(model, batch):
    (Path({folder!r}) / ("workspaces-" + os.environ["RANK"])).write_text(os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    return next_token_loss(model, batch)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The stages before those that train, made once and copied by each test."""
    folder = tmp_path_factory.mktemp("made")
    texts = [
        {"id": n, "text": f"Number {n}: {'the cat sat on the mat and '[: 5 + n % 20]} counted {n * 7}. " * 6}
        for n in range(200)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    turns = [[("user", f"What is {n} plus one?"), ("assistant", str(n + 1))] for n in range(24)]
    lines = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("recipe.yaml", until="model")
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def bessemer(folder, capfd):
    """Runs the command in this process: the exit code, and what it and its processes said."""

    def bessemer(*arguments):
        before = {number: signal.getsignal(number) for number in signal.valid_signals()}
        try:
            with pytest.raises(SystemExit) as ended:
                main(["run", "recipe.yaml", "--allow-code", *arguments])
        finally:
            for number, handler in before.items():  # the elastic agent leaves its own
                if signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
        said = capfd.readouterr()
        return ended.value.code or 0, said.out + said.err

    return bessemer


def by_hand(folder, out, stages=("pretrain", "sft"), **overrides):
    """The same stages without `launch`: every process of a job calls the functions which the recipe's stages are."""
    os.chdir(folder)
    recipe, before = load_recipe("recipe.yaml", overrides, allow_code=True), folder / "runs" / "two" / "stages"
    model = before / "model" / "model"
    for name in stages:
        config = recipe.stage(name).config
        (out / name).mkdir(parents=True, exist_ok=True)
        if name == "pretrain":
            pretrain(config, model, before / "tokenize" / "tokens", out / name, seed=0, folder=folder)
        else:
            sft(config, model, None, out / name, seed=0, folder=folder)
        model = out / name / "model"


def pause(folder):
    """Seconds from the signal until all train again: until the others have stopped, and their start."""
    return (folder / "again").stat().st_mtime - (folder / "struck").stat().st_mtime


def weights(stage_folder):
    return (stage_folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_make_the_weights_of_stages_launched_by_hand(two, folder, bessemer):
    code, said = bessemer("launch.processes=2", "--name", "launched")
    assert code == 0, said
    two.run(by_hand, folder=folder, out=folder / "hand")
    for stage in ("pretrain", "sft"):
        launched = folder / "runs" / "launched" / "stages" / stage
        manifest = json.loads((launched / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["metrics"]["processes"] == 2
        assert weights(launched) == weights(folder / "hand" / stage)


@pytest.mark.slow
def test_every_process_of_a_deterministic_stage_has_the_workspaces_that_this_needs(folder, bessemer, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    (folder / "mine.py").write_text(TELLING.format(folder=str(folder)), encoding="utf-8")
    arguments = ("pretrain.loss=mine.py:loss", "pretrain.deterministic=true", "--until", "pretrain")
    code, said = bessemer("launch.processes=2", *arguments)
    assert code == 0, said
    assert [(folder / f"workspaces-{rank}").read_text(encoding="utf-8") for rank in range(2)] == [":4096:8"] * 2


@pytest.mark.slow
def test_two_processes_fine_tune_as_one_does(two, folder):
    options = {"stages": ["sft"]}
    two.run(by_hand, folder=folder, out=folder / "of two", **options)
    by_hand(folder, folder / "of one", **options)
    of_two, of_one = (
        [record["loss"] for record in read_metrics(folder / name / "sft" / METRICS)] for name in ("of two", "of one")
    )
    assert len(of_one) == 4 and of_two == pytest.approx(of_one, rel=1e-4)


@pytest.mark.slow
def test_inside_a_torchrun_the_same_command_makes_the_same(folder, bessemer):
    code, said = bessemer("launch.processes=2", "--until", "pretrain", "--name", "launched")
    assert code == 0, said
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bessemer"]
    done = subprocess.run(
        [*torchrun, "run", "recipe.yaml", "--until", "pretrain", "--runs", "others"],
        capture_output=True,
        encoding="utf-8",
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    both = [folder / runs / name / "stages" / "pretrain" for runs, name in (("runs", "launched"), ("others", "two"))]
    assert weights(both[0]) == weights(both[1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no kill -9")
def test_when_a_process_dies_all_start_again_and_end_with_the_weights_of_stages_launched_by_hand(two, folder, bessemer):
    (folder / "mine.py").write_text(STRUCK.format(signal="SIGKILL"), encoding="utf-8")
    code, said = bessemer("launch.processes=2", "pretrain.loss=mine.py:loss", "--until", "pretrain", "--name", "launched")
    assert code == 0, said
    assert "process 1 ended with signal 9; all are started again and go on from the last checkpoint" in said
    assert "resuming from step 2 of 6" in said
    two.run(by_hand, folder=folder, out=folder / "hand", stages=["pretrain"], **{"pretrain.loss": "mine.py:loss"})
    launched = folder / "runs" / "launched" / "stages" / "pretrain"
    assert json.loads((launched / "manifest.json").read_text(encoding="utf-8"))["metrics"]["processes"] == 2
    assert weights(launched) == weights(folder / "hand" / "pretrain")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="Windows stops no process")
def test_when_a_process_hangs_the_others_give_up_after_the_timeout_and_all_start_again(folder, bessemer):
    (folder / "mine.py").write_text(STRUCK.format(signal="SIGSTOP"), encoding="utf-8")
    arguments = ("pretrain.loss=mine.py:loss", "pretrain.parallel.timeout=10", "--until", "pretrain")
    code, said = bessemer("launch.processes=2", *arguments)
    assert code == 0, said
    assert "process 0 ended with exit code 1; all are started again and go on from the last checkpoint" in said
    assert "resuming from step 2 of 6" in said
    assert 10 < pause(folder) < ParallelConfig().timeout  # the one that was asked for, not the default


#: A mistake that only the processes which train can find.
MISTAKE = "def nothing(groups):\n    return None\n"


@pytest.mark.slow
def test_a_mistake_is_one_line_and_not_tried_again(folder, bessemer):
    (folder / "mine.py").write_text(MISTAKE, encoding="utf-8")
    code, said = bessemer("launch.processes=2", "pretrain.optimizer=mine.py:nothing", "--until", "pretrain")
    assert code == 2
    assert "error: mine.py:nothing: must return a torch.optim.Optimizer" in said
    assert "Traceback" not in said and "started again" not in said


def quick_worker(rank, place, folder, asked):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **place}
    os.chdir(folder)
    sys.exit(worker.main(asked))


@pytest.fixture
def codes(folder, monkeypatch):
    """The exit codes of workers that begin as copies of a process with everything imported: the elastic agent's import it
    each."""
    codes = []

    def elastic_launch(config, executable):
        def start(module, name, asked):
            with socket.create_server(("127.0.0.1", 0)) as free:
                place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            arguments = [(rank, place, folder, json.loads(asked)) for rank in range(2)]
            workers = [quick_processes().Process(target=quick_worker, args=each) for each in arguments]
            for process in workers:
                process.start()
            for process in workers:
                process.join()
                codes.append(process.exitcode)
            if any(codes):
                raise ChildFailedError(name, {0: ProcessFailure(0, workers[0].pid, codes[0], "")})

        return start

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    return codes


def test_a_mistake_that_the_workers_find_is_told_and_they_are_not_started_again(folder, bessemer, codes):
    (folder / "mine.py").write_text(MISTAKE, encoding="utf-8")
    code, said = bessemer("launch.processes=2", "pretrain.optimizer=mine.py:nothing", "--until", "pretrain")
    assert code == 2 and codes == [2, 2]
    assert "error: mine.py:nothing: must return a torch.optim.Optimizer" in said
    assert "Traceback" not in said and "started again" not in said


#: A user's loss that notes which process computes it, for how many rows, and whether that process trains already.
NOTED = """
import os
from pathlib import Path
from bessemer.training.objectives import next_token_loss

def loss(model, batch):
    trains = any(Path("runs").glob(".store/pretrain-*.partial/autotune.json"))
    with Path("noted").open("a") as stream:
        stream.write(f"{os.environ.get('RANK', 'launcher')} {len(batch.tokens_BT)} {'trains' if trains else 'measures'}\\n")
    return next_token_loss(model, batch)
"""


def test_the_processes_that_train_measure_what_is_open(folder, bessemer, codes):
    (folder / "mine.py").write_text(NOTED, encoding="utf-8")
    arguments = ["launch.processes=2", "pretrain.steps=null", "pretrain.minutes=0.005", "pretrain.loss=mine.py:loss"]
    arguments += ["sft.minutes=0.005", "sft.steps=5000", "--until", "sft", "--name", "launched"]
    code, said = bessemer(*arguments)
    assert (code, set(codes)) == (0, {0}), said
    noted = set((folder / "noted").read_text(encoding="utf-8").splitlines())
    assert noted == {f"{rank} 2 {what}" for rank in (0, 1) for what in ("measures", "trains")}
    metrics = json.loads((folder / "runs" / "launched" / "stages" / "pretrain" / "manifest.json").read_text(encoding="utf-8"))[
        "metrics"
    ]
    assert metrics["processes"] == 2 and metrics["steps"] >= 1
    tuned = json.loads((folder / "runs" / "launched" / "stages" / "sft" / "manifest.json").read_text(encoding="utf-8"))[
        "metrics"
    ]
    assert tuned["processes"] == 2 and 1 <= tuned["steps"] < 5000
    code, said = bessemer(*arguments)
    assert code == 0 and "pretrain: reused" in said and "sft: reused" in said
