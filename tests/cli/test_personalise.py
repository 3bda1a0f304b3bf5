"""`bessemer personalise` and `bessemer person`, with training that is scripted, and a server that is told."""

from __future__ import annotations

import json

import pytest

from bessemer.posttraining import personal
from tests.chat_server import serving
from tests.cli.test_main import bessemer, one_error

LINE = {"time": 0.0, "pairs": 30, "held_out": 10, "base": 0.5, "new": 0.9, "gain": 0.4, "gain_95": [0.1, 0.7]}


@pytest.fixture
def people(tmp_path, monkeypatch):
    """The current folder, with a model's folder and the feedback of a person."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    folder = tmp_path / "people" / "ann"
    folder.mkdir(parents=True)
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    return folder


@pytest.mark.parametrize(("decision", "expected"), [("used", 0), ("rolled back", 3)])
def test_what_was_decided_is_said_and_a_server_loads_what_is_used(people, capsys, monkeypatch, decision, expected):
    def scripted(base, person, config, **_):
        assert (base.name, person, config.minutes) == ("model", people.relative_to(people.parents[1]), 2.0)
        (person / "adapter").mkdir()
        return LINE | {"decision": decision, "reason": "so it is"}

    monkeypatch.setattr(personal, "personalise", scripted)
    with serving(monkeypatch) as start:
        server = start(lambda body, number: (200, {}, b"Success"))
        url = server.url.removesuffix("/v1")
        code, out, _ = bessemer(capsys, "personalise", "model", "ann", "--minutes", "2", "--url", url)
        assert code == expected
        assert out.startswith(f"ann: {decision}: so it is (50% to 90% of 10 held-out pairs, 95 %: +10% to +70%;")
        told = [(request[0], request[2]) for request in server.requests]
        loaded = {"lora_name": "ann", "lora_path": "ann/adapter", "load_inplace": True}
        assert told == ([("/v1/load_lora_adapter", loaded)] if decision == "used" else [])


def test_feedback_given_while_an_adapter_trains_is_looked_at_next(people, capsys, monkeypatch):
    seen = []

    def scripted(base, person, config, **_):
        seen.append((person / "pairs.jsonl").read_text(encoding="utf-8").count("\n"))
        if len(seen) == 2:
            raise KeyboardInterrupt
        with (person / "pairs.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"prompt": "d", "chosen": "e", "rejected": "f"}\n')
        return LINE | {"decision": "waits", "reason": "too little feedback"}

    def waited(seconds):
        raise AssertionError("it waits, although there is new feedback")

    monkeypatch.setattr(personal, "personalise", scripted)
    monkeypatch.setattr("bessemer.cli.personalise.time.sleep", waited)
    bessemer(capsys, "personalise", "model", "ann", "--watch", "600")
    assert seen == [1, 2]


def test_a_person_is_shown_exported_and_forgotten(people, capsys):
    code, out, _ = bessemer(capsys, "person", "ann")
    assert code == 0 and "ann: 1 pairs of feedback" in out and "pairs.jsonl" in out
    code, out, _ = bessemer(capsys, "person", "ann", "--json")
    assert json.loads(out)["pairs"] == 1
    code, out, _ = bessemer(capsys, "person", "ann", "--export", "ann.zip")
    assert code == 0 and (people.parents[1] / "ann.zip").exists()
    code, out, _ = bessemer(capsys, "person", "ann", "--forget")
    assert code == 0 and not people.exists()
    code, _, err = bessemer(capsys, "person", "ann")
    assert code == 2 and "nothing is kept of this person" in one_error(err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["person", "../ann"], "a person's name is"),
        (["person", "ann", "--forget", "--roll-back"], "one of them at a time"),
        (["person", "ann", "--roll-back"], "no adapter is in use"),
        (["person", "ann", "--forget", "--url", "http://127.0.0.1:9"], "no server answers"),
        (["personalise", "model", "bob"], "there is no feedback in it"),
        (["personalise", "model", "ann", "--rank", "0"], "--rank"),
        (["personalise", "nothing", "ann"], "nothing"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_and_delete_nothing(people, capsys, arguments, said):
    code, _, err = bessemer(capsys, *arguments)
    assert code == 2 and said in one_error(err) and (people / "pairs.jsonl").exists()
