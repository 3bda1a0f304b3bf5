import json

from tests.cli.test_main import bessemer, one_error
from tests.posttraining.test_turns import CALLS, PLAIN, TOOLS
from tests.training.conftest import documents, model_folder, tokenized  # noqa: F401


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_tokens_are_shown_with_what_is_learnt_of_them(model_folder, tmp_path, capsys):  # noqa: F811
    file = written(tmp_path / "chats.jsonl", {"messages": PLAIN[:4]}, {"messages": CALLS, "tools": TOOLS})
    code, out, err = bessemer(capsys, "data", "preview", file, "--model", model_folder, "--rows", "1")
    assert code == 0, err
    assert "template chatml, calls of tools as hermes" in out and "2 rows give 2 examples" in out
    assert "⟦It rains.<|im_end|>■⟧" in out.replace("\n", "") and "How is the weather?" in out


def test_as_json_every_token_says_whether_it_is_learnt(model_folder, tmp_path, capsys):  # noqa: F811
    file = written(tmp_path / "chats.jsonl", {"messages": PLAIN[:2]})
    code, out, _ = bessemer(capsys, "data", "preview", file, "--model", model_folder, "--json")
    (row,) = json.loads(out)["shown"]
    (tokens,) = row["examples"]
    assert code == 0 and "".join(token["text"] for token in tokens if token["is_learnt"]) == "It rains.<|im_end|>"
    assert [token["text"] for token in tokens if token["is_end"]] == ["<|im_end|>"]


def test_a_row_that_is_not_there_is_one_line(model_folder, tmp_path, capsys):  # noqa: F811
    file = written(tmp_path / "chats.jsonl", {"messages": PLAIN[:2]})
    code, _, err = bessemer(capsys, "data", "preview", file, "--model", model_folder, "--rows", "2")
    assert code == 2 and "numbers from 1 to 1" in one_error(err)
