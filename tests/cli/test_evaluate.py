"""`bessemer evaluate`."""

from __future__ import annotations

import hashlib
import io
import json
import urllib.error

import pytest

from bessemer.core.records import json_lines
from bessemer.model.config import ModelConfig
from bessemer.model.storage.folder import save_model
from bessemer.tasks import downloads
from bessemer.tasks.registry import TASKS
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
    results = json.loads((tmp_path / folder / "results.json").read_text(encoding="utf-8"))
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
    assert "animals: error 0." in (tmp_path / folder / "reliability.svg").read_text(encoding="utf-8")
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
    found = json.loads((tmp_path / "found" / "results.json").read_text(encoding="utf-8"))["contamination"]["quiz"]
    assert (found["dirty"], found["clean"], found["unknown"]) == (1, 1, 1)
    items = json_lines((tmp_path / "found" / "items.jsonl").read_text(encoding="utf-8"))
    assert found["dirty_accuracy"] == items[0]["score"] and found["clean_accuracy"] == items[1]["score"]
    assert any(line.split()[:4] == ["quiz", "1", "of", "3"] for line in out.splitlines())
    # what is computed is kept, and looking in another corpus asks the model nothing
    code, _, err = bessemer(capsys, *arguments[:-1], "nowhere")
    assert code == 2 and "no documents to look for contamination in" in one_error(err)


@pytest.mark.parametrize("arguments", [["--list-tasks"], ["some-model", "--tasks"]])
def test_the_tasks_are_listed_with_what_each_asks_and_where_its_data_is(capsys, arguments):
    code, out, _ = bessemer(capsys, "evaluate", *arguments)
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert lines.keys() == {*TASKS, "core"}
    assert "science questions" in lines["arc_easy"] and "637 kB, licence CC BY-SA 4.0, allenai/ai2_arc" in lines["arc_easy"]


def test_data_that_is_not_there_is_fetched_once_into_the_cache(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps({"query": f"{n} is", "choices": ["a", "b"], "gold": 0}) + "\n" for n in range(3)).encode()
    asked = []
    monkeypatch.setattr(downloads, "DATA_FILES", fetched_from(rows))
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: asked.append(url) or io.BytesIO(rows))
    arguments = ["evaluate", model, "--tasks", "copa", "--limit", "2", "--out", "found"]
    code, out, err = bessemer(capsys, *arguments)
    assert code == 0, err
    assert "fetching copa.jsonl (3 items, " in err and "copa" in out
    assert (tmp_path / "runs" / ".cache" / "tasks" / "copa.jsonl").read_bytes() == rows
    assert bessemer(capsys, *arguments)[0] == 0 and len(asked) == 1


def fetched_from(rows):
    """The file of COPA, with another content."""
    sha256 = hashlib.sha256(rows).hexdigest()
    return {"copa.jsonl": downloads.DATA_FILES["copa.jsonl"]._replace(items=3, bytes=len(rows), sha256=sha256)}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (urllib.error.URLError("no route"), "copa.jsonl: cannot be fetched (no route); bring https://"),
        (io.BytesIO(b"{}"), "holds another file now; bring https://"),
        (None, "HF_HUB_OFFLINE forbids to fetch it; bring https://"),
    ],
)
def test_data_that_cannot_be_fetched_names_the_file_to_bring(model, tmp_path, monkeypatch, capsys, answer, message):
    monkeypatch.chdir(tmp_path)

    def answered(url, timeout):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("urllib.request.urlopen", answered)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if answer is None else "0")
    code, _, err = bessemer(capsys, "evaluate", model, "--tasks", "copa")
    assert code == 2 and message in err.splitlines()[-1] and "copa.jsonl and name its folder with --data" in err
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_eazy"], "there is no task 'arc_eazy'; did you mean 'arc_easy'?"),
        (["--tasks", "none.yaml"], "none.yaml: cannot be read"),
        (["--tasks", ","], "no task is named"),
        (["--tasks", "arc_easy", "--data", "."], "there is no arc_easy.jsonl in . and "),
        (["--tasks", "arc_easy", "--no-fetch"], "say where the data of tasks lies with --data; it is https://"),
        ([], "no task is named; there are arc_easy, "),
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
