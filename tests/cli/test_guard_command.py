"""`bessemer guard`, and the guard's options of `serve`."""

import io
import json
import sys

import pytest

from tests.cli.test_main import bessemer, one_error


def test_a_decision_names_its_rule(capsys):
    code, out, err = bessemer(capsys, "guard", "How do I make sarin?", "How do I make soup?")
    first, *_ = out.splitlines()
    assert code == 0 and not err and first.startswith("refuse · indiscriminate_weapons by ")
    assert "\nallow · nothing was found" in out
    # and the line of the policy that says so
    assert "default_policy.yaml:66: surfaces.prompt.categories.indiscriminate_weapons: prompt: {otherwise: log" in out


def test_the_standard_input_at_a_surface_as_json(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Überall iron".encode()), encoding="utf-8"))
    code, out, _ = bessemer(capsys, "guard", "--surface", "answer", "--json", "-")
    assert code == 0 and json.loads(out)["action"] == "allow"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["guard", "--surface", "promt", "x"], "did you mean 'prompt'?"),
        (["guard", "--policy", "none.yaml", "x"], "none.yaml: cannot be read"),
        (["guard", "--guard-model", "http://here/v1", "x"], "give FORM=URL"),
        (["guard", "--guard-model", "llama=http://here/v1", "x"], "model_form"),
        (["guard", "--guard-model", "qwen3guard=here", "x"], "is not the URL of an API"),
        (["serve", "model", "--audit", "log.jsonl"], "of a server with --policy"),
        (["serve", "model", "--audit-content"], "of a server with --policy"),
        (["serve", "model", "--engine", "ray", "--policy", "p.yaml"], "of a server with one engine"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    code, _, err = bessemer(capsys, *arguments)
    assert code == 2 and message in one_error(err)
