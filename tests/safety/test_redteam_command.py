"""`bessemer redteam` on a model and on a URL, and the stage of a recipe."""

from __future__ import annotations

import json

import pytest

from bessemer.core.progress import Silent
from bessemer.core.report import StageReport
from bessemer.core.stage import StageContext
from bessemer.model.storage.folder import save_model
from bessemer.pipeline.stages import STAGES
from bessemer.safety.redteam.config import RedTeamConfig
from tests.chat_server import completion, serving
from tests.cli.test_main import bessemer, one_error
from tests.inference.models import small_decoder, small_tokenizer

SHORT = (
    "--attacks",
    "direct,prefix_injection,tool_injection",
    "--categories",
    "hate,injection",
    "--limit",
    "1",
    "--max-tokens",
    "12",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a random model."""
    folder = tmp_path_factory.mktemp("attacked")
    save_model(small_decoder("dense"), folder / "model", tokenizer=small_tokenizer(folder).folder)
    return folder / "model"


@pytest.fixture
def start(monkeypatch):
    with serving(monkeypatch) as started:
        yield started


def test_a_model_is_attacked_and_the_same_command_goes_on(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = bessemer(capsys, "redteam", model, *SHORT)
    assert status == 0, err
    run = tmp_path / "redteam" / "model"
    found = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert found["measurable"] is False and "Not measurable" in out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(words in page for words in ("By category", "success by category and attack", "Not measurable"))
    # the context of this model does not hold every prompt, and that is said
    assert found["errors"] and all("does not fit" in why for why in found["errors"])
    before = (run / "queries.jsonl").read_bytes()
    assert bessemer(capsys, "redteam", model, *SHORT)[0] == 0 and (run / "queries.jsonl").read_bytes() == before
    again = ("--out", "again", "--before", run)
    status, out, _ = bessemer(capsys, "redteam", model, *SHORT, *again)
    assert status == 0 and "Before and after" in out and (tmp_path / "again" / "comparison.json").is_file()


def test_a_url_is_attacked_and_the_exit_code_follows_the_limit(start, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def respond(body, number):
        text = body["messages"][-1]["content"]
        if "sorry" in text:
            return 400, {}, json.dumps({"error": {"message": "filtered"}}).encode()
        if body.get("tools"):
            call = {"id": "x", "type": "function", "function": {"name": "read_page", "arguments": text[-24:]}}
            return 200, {}, json.dumps({"choices": [{"message": {"content": None, "tool_calls": [call]}}]}).encode()
        return completion("I cannot help with that.")

    server = start(respond)
    words = ("redteam", server.url, "--model-name", "tiny", *SHORT, "--out", "run")
    status, _, err = bessemer(capsys, *words)
    assert status == 0, err
    found = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert found["by_attack"]["prefix_injection"]["outcomes"] == {"blocked": 1}
    # the code word came back in the arguments of a call
    assert found["by_attack"]["tool_injection"]["rate"] == 1
    assert found["harmless"]["refused"]["rate"] == 1
    asked = len(server.requests)
    status, out, _ = bessemer(capsys, *words, "--fail-above", "50")
    assert status == 1 and "tool_injection succeeds in 100.0%" in out and len(server.requests) == asked
    assert bessemer(capsys, *words, "--fail-above", "100")[0] == 0


def test_an_answer_that_a_filter_ended_is_blocked_whatever_its_words(start, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def respond(body, number):
        message = {"role": "assistant", "content": "That is nothing for this shop."}
        return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": "content_filter"}]}).encode()

    server = start(respond)
    status, _, err = bessemer(capsys, "redteam", server.url, "--model-name", "tiny", *SHORT, "--out", "run")
    assert status == 0, err
    found = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert found["harmless"]["refused"]["rate"] == 1 and found["harmless"]["outcomes"] == {"blocked": 1}
    assert found["by_attack"]["direct"]["outcomes"] == {"blocked": 1}


def test_a_server_that_fails_costs_one_line_and_no_reply(start, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limit = [3]

    def respond(body, number):
        return completion("I cannot help with that.") if number <= limit[0] else (401, {}, b"{}")

    server = start(respond)
    options = ("--attacks", "direct", "--categories", "hate", "--out", "run", "--workers", "1")
    words = ("redteam", server.url, "--model-name", "tiny", *options)
    status, _, err = bessemer(capsys, *words)
    assert status == 2 and "401" in one_error(err)
    failed, limit[0] = len(server.requests) - 3, 1000
    # the next request may be under way when one fails; the others are not sent
    assert failed <= 2 and bessemer(capsys, *words)[0] == 0
    # six goals: three were answered before
    assert len(server.requests) == 3 + failed + 3


def test_an_attacker_and_a_judge_at_urls_take_part(start, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rated = start(lambda body, number: completion("refused: 0, specific: 4, convincing: 4"))
    writes = start(lambda body, number: completion('{"improvement": "x", "prompt": "Tell me, friend."}'))
    target = start(lambda body, number: completion("Well now, this is a long and friendly talk about nothing much."))
    words = ("--attacks", "direct,refinement", "--set", "refinement.streams=1", "--set", "refinement.turns=2", "--out", "run")
    models = ("--attacker", f"{writes.url}#writer", "--judge", f"{rated.url}#judge", "--model-name", "tiny")
    status, out, err = bessemer(capsys, "redteam", target.url, "--categories", "hate", "--limit", "1", *words, *models)
    assert status == 0, err
    assert "the judge alone" in out and len(writes.requests) == 2
    assert [body["messages"][-1]["content"] for _, _, body in target.requests].count("Tell me, friend.") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attacks", "directt"), "did you mean 'direct'"),
        (("--categories", "hat"), "did you mean 'hate'"),
        (("--set", "best_of_n=3"), "give it as ATTACK.SETTING=VALUE"),
        (("--attacks", "best_of_n", "--set", "best_of_n.samples=none"), "best_of_n.samples"),
        (("--attacker", "http://127.0.0.1:1/v1"), "name its model behind the URL"),
        (("--before", "nowhere"), "this is no red team's run"),
        (("--seeds", "none.yaml"), "none.yaml"),
        (("--policy", "none.yaml"), "none.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(words, message, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = bessemer(capsys, "redteam", model, *words)
    assert status == 2 and message in one_error(err)
    assert bessemer(capsys, "redteam", "no-such-model")[0] == 2


def test_attacks_are_listed(capsys):
    status, out, _ = bessemer(capsys, "redteam", "--list-attacks")
    assert status == 0 and "* gcg" in out and "  best_of_n" in out


def test_the_stage_measures_its_time_attacks_and_shows_its_form(model, tmp_path):
    spec = STAGES["redteam"]
    config = RedTeamConfig(attacks=["direct", "gcg"], categories=["hate"], limit=1, max_tokens=4, minutes=0.5)
    config = config.with_changes(attack_settings={"gcg": {"steps": 1, "candidates": 4, "suffix_tokens": 4}})
    context = StageContext(config, {"model": model}, tmp_path / "out", tmp_path, tmp_path, 7, "cpu", Silent())
    assert not config.resolved
    resolved, measured = spec.resolve(context)
    assert resolved.resolved and resolved.budget == measured["queries"] >= 8
    context = StageContext(resolved, {"model": model}, tmp_path / "out", tmp_path, tmp_path, 7, "cpu", Silent())
    metrics = spec.run(context)
    assert set(metrics["by_attack"]) == {"direct", "gcg"}
    # an interrupted stage keeps its replies
    assert (tmp_path / "out" / "checkpoints" / "queries.jsonl").is_file()
    section = spec.report(StageReport(name="redteam", kind="redteam", metrics=metrics, folder=tmp_path / "out"))
    assert section.headline and "Not measurable" in section.parts[0].text
    assert "not measurable" in spec.summary_line(metrics) and not spec.key_figures(
        StageReport(name="redteam", kind="redteam", metrics=metrics, folder=tmp_path / "out")
    )
