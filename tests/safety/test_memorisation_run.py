"""The stage `memorisation` in a run, unlearning behind it, and the commands that read them."""

import json
import re
from pathlib import Path

import pytest

from bessemer.core.store import read_json
from bessemer.data.corpus.reader import iterate_documents
from bessemer.data.sources.canaries import NUMBER, read_canaries
from bessemer.pipeline.api import run
from bessemer.safety.memorisation.verdict import unsafe
from tests.cli.test_main import bessemer, one_error
from tests.data.conftest import PROSE

RECIPE = """
format: 1
name: small
seed: 3
collect:
  sources:
    - {source: files, paths: texts.jsonl}
    - {source: canaries, draws: 2, repetitions: [1, 48], replaced: 0, words: 10, suffix_words: 3}
  buckets: 4
tokenize: {algorithm: bpe, vocab_size: 512, split: qwen2}
model:
  {preset: null, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, head_dim: 32,
   intermediate_size: 128, max_position_embeddings: 128}
pretrain:
  {steps: 200, batch_size: 8, context_length: 64, optimizer: muon, learning_rate: 1e-2, matrix_learning_rate: 5e-3,
   dtype: float32, compile: false, threads: 1, evaluate_every: 1000, diagnostics_every: 0, sample_prompts: []}
forgetting: {sources: [canaries], keep: 30, alike: 20, words: 24}
unlearned:
  {kind: preference, from: {model: pretrain}, loss: npo, data: [made/forgetting], steps: 30, batch_size: 4, context_length: 128,
   learning_rate: 2e-3, dtype: float32, compile: false, threads: 1, evaluate_every: 1000, diagnostics_every: 0}
memorisation: {models: [pretrain, unlearned], formats: [original, int4], candidates: 32, unseen: 8}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memorised")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        records = [{"id": f"n{number}", "text": PROSE.format(n=number)} for number in range(400)]
        Path("texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        Path("recipe.yaml").write_text(RECIPE)
        run("recipe.yaml")
        yield folder


@pytest.fixture(scope="module")
def stages(place):
    return place / "runs" / "small" / "stages"


def documents(stages):
    return [row for batch in iterate_documents(stages / "collect" / "documents") for row in batch.to_pylist()]


def test_what_stood_there_often_is_known_and_extracted(stages):
    entry = read_json(stages / "memorisation" / "ledger.json", "ledger")["models"]["pretrain"]["original"]
    by = {cell["repetitions"]: cell for cell in entry["by"]}
    assert by[48]["exposure"][0] > by[1]["exposure"][0] + 1 and by[48]["extracted"] >= 1
    assert by[48]["nats"] < by[1]["nats"]


def test_unlearning_makes_it_unlikely(stages):
    models = read_json(stages / "memorisation" / "ledger.json", "ledger")["models"]
    before, after = (models[name]["original"] for name in ("pretrain", "unlearned"))
    assert after["extraction"]["extracted"] < before["extraction"]["extracted"]
    assert after["by"][-1]["nats"] > before["by"][-1]["nats"] + 3
    assert after["exposure"]["planted"][0] < before["exposure"]["planted"][0]


def test_rows_of_what_is_forgotten_are_the_different_texts(stages):
    rows = [json.loads(line) for line in (stages / "forgetting" / "forgetting.jsonl").read_text().splitlines()]
    forget, keep = ([row for row in rows if row["label"] == wanted] for wanted in (False, True))
    canaries = {dict(row["metadata"])[NUMBER]: row["text"] for row in documents(stages) if NUMBER in dict(row["metadata"])}
    assert {row["prompt"] + row["completion"] for row in forget} == set(canaries.values()) and len(forget) == 4
    assert len(keep) == 50 and all(len(row["prompt"].split()) == 4 for row in rows)


def test_the_report_shows_figure_and_verdict(place, stages):
    page = (place / "runs" / "small" / "report.html").read_text()
    assert "What is memorised" in page and "never planted" in page
    assert unsafe(read_json(stages / "memorisation" / "ledger.json", "ledger"))[0] in page


def test_the_command_says_where_extraction_succeeds_and_exits_with_1(place, stages, capsys):
    canaries = stages / "memorisation" / "canaries.jsonl"
    assert len(read_canaries(canaries)) == 4 + 32
    model = stages / "pretrain" / "model"
    code, out, _ = bessemer(
        capsys, "memorisation", model, "--canaries", canaries, "--formats", "original,int8", "--out", place / "ledger.json"
    )
    assert code == 1 and out.splitlines()[-1].startswith(f"Extraction succeeds: {model} in original (")
    assert list(read_json(place / "ledger.json", "ledger")["models"][str(model)]) == ["original", "int8"]


def test_a_model_that_never_saw_them_gives_nothing(stages, capsys):
    canaries = stages / "memorisation" / "canaries.jsonl"
    code, out, _ = bessemer(capsys, "memorisation", stages / "model" / "model", "--canaries", canaries, "--formats", "original")
    assert code == 0 and out.splitlines()[-1] == "Nothing is extracted."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--canaries", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--canaries", "runs/small/stages/memorisation/canaries.jsonl", "--formats", "int5"], "int5"),
    ],
)
def test_mistakes_are_one_line(place, stages, capsys, arguments, message):
    code, _, err = bessemer(capsys, "memorisation", stages / "pretrain" / "model", *arguments)
    assert code == 2 and message in one_error(err)


def test_forget_refuses_a_model_that_still_knows_the_document(place, stages, capsys):
    planted = [row for row in documents(stages) if NUMBER in dict(row["metadata"])]
    often = next(row for row in planted if sum(other["text"] == row["text"] for other in planted) == 48)
    code, out, _ = bessemer(capsys, "forget", often["id"], "--check", "--dry-run", "--formats", "original")
    last = out.splitlines()[-1]
    assert code == 1 and re.match(r"Not safe, the document can be extracted: pretrain-\w+ in original", last)
    assert often["text"].split()[-1] in out and "nothing is extracted" in out  # of the unlearnt model


def test_forget_without_a_model_that_knows_it_is_at_peace(place, stages, capsys):
    other = next(row for row in documents(stages) if NUMBER not in dict(row["metadata"]) and row["split"] != "train")
    code, out, _ = bessemer(capsys, "forget", other["id"], "--dry-run")
    assert code == 0 and "Not safe" not in out
