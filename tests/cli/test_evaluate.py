"""`bessemer evaluate`."""

from __future__ import annotations

import json

import pytest

from bessemer.core.json_lines import json_lines
from bessemer.model.config import ModelConfig
from bessemer.model.folder import save_model
from tests.cli.test_main import bessemer, one_error
from tests.evaluation.test_contamination import write_corpus
from tests.model.randomised import random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer
from tests.tasks.written import ANIMALS, write_task


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    config = ModelConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=256)
    save_model(random_decoder(config), folder / "model", tokenizer=write_small_tokenizer(folder / "tokenizer"))
    return folder / "model"


def test_evaluate_writes_a_table_and_a_folder_of_its_own_settings(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, ANIMALS, name="animals", kind="choice", score="raw")
    write_task(tmp_path, [{"context": "1+1=", "answer": "2"}], name="sums", kind="generate", max_tokens=4)
    arguments = ["evaluate", model, "--tasks", "animals.yaml,sums.yaml", "--samples", "2"]
    code, out, _ = bessemer(capsys, *arguments)
    assert code == 0
    *table, _, folder = out.splitlines()
    results = json.loads((tmp_path / folder / "results.json").read_text())
    accuracy = results["tasks"]["animals"]["accuracy"]
    row = next(line.split() for line in table if line.startswith("animals"))
    assert row == [
        "animals",
        "3",
        "0",
        "cloze",
        "raw",
        f"{accuracy:.4f}",
        f"{results['tasks']['animals']['standard_error']:.4f}",
        "0.3333",
    ]
    assert any("maj@2" in line for line in table)
    assert "animals: error 0." in (tmp_path / folder / "reliability.svg").read_text()
    assert bessemer(capsys, *arguments)[1] == out
    _, other, _ = bessemer(capsys, *arguments, "--shots", "0", "--limit", "2")
    assert other.splitlines()[-1] != folder


def test_how_much_of_a_task_stands_in_the_training_corpus_is_told_beside_its_score(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    question = "Which gas do the leaves of green plants take in from the air when the sun shines on them?"
    other = "Which metal is made by blowing air through molten pig iron in a large converter of that name?"
    rows = [{"query": one, "choices": ["a", "b"], "gold": 0} for one in (question, other, "Which one?")]
    write_task(tmp_path, rows, name="quiz", kind="choice", score="raw")
    write_corpus(tmp_path / "corpus", [(f"Homework. {question} Good luck!", "train"), (other, "validation")])
    arguments = ["evaluate", model, "--tasks", "quiz.yaml", "--out", "found", "--corpus", "corpus"]
    code, out, err = bessemer(capsys, *arguments)
    assert code == 0, err
    found = json.loads((tmp_path / "found" / "results.json").read_text())["contamination"]["quiz"]
    assert (found["dirty"], found["clean"], found["unknown"]) == (1, 1, 1)
    items = json_lines((tmp_path / "found" / "items.jsonl").read_text())
    assert found["dirty_accuracy"] == items[0]["score"] and found["clean_accuracy"] == items[1]["score"]
    assert any(line.split()[:4] == ["quiz", "1", "of", "3"] for line in out.splitlines())
    # what is computed is kept, and looking in another corpus asks the model nothing
    code, _, err = bessemer(capsys, *arguments[:-1], "nowhere")
    assert code == 2 and "no documents to look for contamination in" in one_error(err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_eazy"], "there is no task 'arc_eazy'; did you mean 'arc_easy'?"),
        (["--tasks", "none.yaml"], "none.yaml: cannot be read"),
        (["--tasks", ","], "no task is named"),
        (["--tasks", "arc_easy", "--data", "."], "there is no arc_easy.jsonl in . and "),
        (["--tasks", "animals.yaml", "--shots", "9"], "9 examples need 10 items, and there are 3; ask for fewer with --shots"),
        (["--tasks", "animals.yaml", "--system", "Be brief."], "system needs chat: true"),
        (["--tasks", "arithmetic", "--thinking-budget", "8"], "thinking_budget needs chat: true"),
        (["--tasks", "animals.yaml", "--out", "."], "exists and holds something other than an evaluation"),
    ],
)
def test_a_mistake_gets_one_line(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, ANIMALS, name="animals", kind="choice")
    code, _, err = bessemer(capsys, "evaluate", model, *arguments)
    assert code == 2 and message in one_error(err)
