import csv
import json
import random
import xml.etree.ElementTree as ElementTree

import pytest

from bessemer.model.config import preset_config
from bessemer.pipeline.recipe import load_recipe
from bessemer.scaling.laws.parametric import BESIROGLU
from tests.cli.test_main import bessemer, one_error
from tests.scaling.test_laws import NANOCHAT, isoflop_points, planted

RECIPE = """
format: 1
name: tiny
seed: 7
collect: [{source: files, paths: documents.jsonl}]
tokenize: {vocab_size: 290}
model: {preset: qwen3-1m, num_hidden_layers: 1, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2,
  num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 32}
pretrain: {steps: 4, batch_size: 2, context_length: 32, dtype: float32, compile: false, evaluate_tokens: 512, optimizer: adamw,
  sample_prompts: [], diagnostics_every: 0}
"""


def write_points(path, points) -> str:
    lines = [f"{one.parameters},{one.tokens},{one.loss},{one.flops or ''}" for one in points.points]
    path.write_text("\n".join(["parameters,tokens,loss,flops", *lines]) + "\n", encoding="utf-8")
    return str(path)


def test_a_csv_s_law_is_printed_with_its_intervals_kept_and_drawn(tmp_path, capsys):
    source = write_points(tmp_path / "points.csv", planted(noise=0.005))
    code, out, err = bessemer(
        capsys, "scaling", "fit", source, "--resamples", 40, "--out", tmp_path / "law.json", "--plots", tmp_path / "plots"
    )
    assert code == 0, err
    for words in ("on 30 points", "as the CSV counts it", "Huber, L-BFGS", "grid, NNLS", "N ∝ C^a: a"):
        assert words in out, words
    drawn = ElementTree.parse(tmp_path / "plots" / "fit.svg")
    assert "predicted loss" in "".join(drawn.getroot().itertext())
    code, out, err = bessemer(
        capsys, "scaling", "suggest", "--flops", "1e22", "--law", tmp_path / "law.json", "--out", tmp_path / "next.yaml"
    )
    assert code == 0, err
    assert "grid fit to 30 points" in out and "of runs between" in out and "times the compute of the largest point" in out
    assert load_recipe(str(tmp_path / "next.yaml")).name == "next"


def test_a_run_is_predicted_before_it_is_trained(tmp_path, capsys):
    source = write_points(tmp_path / "points.csv", planted(noise=0.005))
    law = tmp_path / "law.json"
    code, _, err = bessemer(capsys, "scaling", "fit", source, "--method", "grid", "--resamples", 40, "--out", law)
    assert code == 0, err
    arguments = ("scaling", "predict", "qwen3-0.6b", "pretrain.tokens=100_000_000_000", "--law", law)
    code, out, err = bessemer(capsys, *arguments)
    assert code == 0, err
    assert "grid fit to 30 points" in out and "of runs between" in out and "times the compute of the largest point" in out
    found = json.loads(bessemer(capsys, *arguments, "--json")[1])
    model = preset_config("qwen3-0.6b", 151_936)
    truth = BESIROGLU.predict(model.active_parameters(), found["tokens"])
    assert 1e11 <= found["tokens"] < 1.001e11 and found["interval"][0] < truth < found["interval"][1]


def test_isoflop_parabolas_come_with_their_bias(tmp_path, capsys):
    source = write_points(tmp_path / "points.csv", isoflop_points(BESIROGLU))
    arguments = ("scaling", "fit", source, "--isoflop", "--resamples", 20, "--method", "grid", "--plots", tmp_path)
    code, out, err = bessemer(capsys, *arguments)
    assert code == 0, err
    assert "parabolas are biased where α ≠ β: on these sizes" in out
    assert "1e+18 FLOPs" in (tmp_path / "isoflop.svg").read_text(encoding="utf-8")
    found = json.loads(bessemer(capsys, *arguments, "--json")[1])
    assert found["isoflop"]["exponent"] == pytest.approx(found["fits"][0]["parameters_exponent"]["value"], abs=0.01)


def test_nanochat_s_points_are_refused_as_a_law_and_said_to_be_few_as_a_frontier(tmp_path, capsys):
    source = write_points(tmp_path / "nanochat.csv", NANOCHAT)
    code, out, err = bessemer(capsys, "scaling", "fit", source)
    assert code == 2 and not out and "too few points (4)" in one_error(err)
    code, out, _ = bessemer(capsys, "scaling", "fit", source, "--optimal")
    assert code == 0 and "N ∝ C^a: a = 0.5" in out
    assert "2 degrees of freedom" in out and "nothing in them can show either" in out and "too few for it" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fit", "nothing.csv"), "nothing.csv: cannot be read"),
        (("fit", "nothing"), "there is no run 'nothing'"),
        (("fit", "a.csv", "b.csv"), "give one CSV, or runs"),
        (("predict", "quickstart"), "give pretrain.tokens=… instead of minutes"),
        (("suggest",), "give a budget"),
        (("suggest", "--flops", "1e20", "--days", "2"), "give a budget"),
        (("suggest", "--days", "2"), "--days needs the number of cards"),
        (("suggest", "--flops", "1e20", "--law", "law.json"), "there is no such file"),
        (("suggest", "--gpus", "8", "--days", "2", "--gpu", "h1000"), "did you mean 'h100'?"),
        (("suggest", "--flops", "1e3"), "another budget"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = bessemer(capsys, "scaling", *arguments)
    assert code == 2 and not out and words in one_error(err)


def test_a_sweep_trains_tabulates_and_draws_and_its_runs_are_points(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "to", "hill", "and", "saw", "red", "sun"]
    lines = [json.dumps({"id": str(number), "text": " ".join(draw.choices(words, k=80))}) for number in range(150)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = ("sweep", "tiny.yaml", "pretrain.steps=4,16", "--seeds", 1)
    code, out, err = bessemer(capsys, *command)
    assert code == 0, err
    assert "Table: runs/sweeps/tiny.csv" in out and "Plot:  runs/sweeps/tiny.svg" in out
    with (tmp_path / "runs" / "sweeps" / "tiny.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["tokens"]) for row in rows] == [256, 1024]
    assert {int(row["parameters"]) - int(row["non_embedding_parameters"]) for row in rows} == {290 * 32}
    # more training, less loss
    assert float(rows[0]["loss"]) > float(rows[1]["loss"])
    assert bessemer(capsys, *command)[2].count("starts") == 0
    code, out, err = bessemer(capsys, "scaling", "fit", *(row["run"] for row in rows))
    assert code == 2 and not out and "too few points (2)" in one_error(err)
