"""Synthetic data by a scripted writer at a URL: prompts after the example of seeds, filters, copies, provenance."""

import json
import math
import shutil

import pytest

from bessemer.core.chat_client import ApiError
from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.report import StageReport
from bessemer.posttraining.data.examples import read_conversations
from bessemer.posttraining.synthetic.config import SynthesizeConfig
from bessemer.posttraining.synthetic.specs import synthesize_report
from bessemer.posttraining.synthetic.synthesize import prompt_request, synthesize, without_fence
from tests.chat_server import completion, serving

SEEDS = ["How do bees find their way home to the hive?", "Why is the sky blue in the day and red at night?"]
PROMPTS = [
    "What makes bread rise when it is in the oven?",
    "How do BEES find their way home to the hive?",
    "Which river of the world carries the most water?",
    "Which river of the world carries the most water?",
    "Who was the first to measure the speed of light?",
    "",
]
ANSWERS = {
    "What makes bread rise": "Yeast eats sugar and gives off gas, which the dough holds.",
    "Which river": "You are a stupid idiot and a worthless moron, you disgusting piece of trash.",
    "Who was the first": "Ole Rømer, from the moons of Jupiter. ",
}


@pytest.fixture
def serve(monkeypatch):
    with serving(monkeypatch) as started:
        yield started


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps({"prompt": seed}) + "\n" for seed in SEEDS), encoding="utf-8")
    return tmp_path


class Script:
    """Writes the prompts in order, and answers them; breaks off after a number of requests."""

    def __init__(self, until=math.inf):
        self.until, self.prompts, self.requests = until, iter(PROMPTS), []

    def __call__(self, body, _):
        if len(self.requests) >= self.until:
            return 400, {}, b"{}"
        asked = body["messages"][-1]["content"]
        self.requests.append(asked)
        if asked.startswith("Below is what people asked"):
            return completion(next(self.prompts))
        return completion(next((answer for start, answer in ANSWERS.items() if asked.startswith(start)), "Yes."))


def ending_soon(model_folder, folder):
    """A copy of a model's folder in which every eighth token ends an answer: answers of a random model end too."""
    shutil.copytree(model_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 320, 8))}), encoding="utf-8")
    return folder


def run(folder, out, server, **changes):
    writer = {"model": "writer", "url": server.url, "workers": 1, "attempts": 1}
    given = {"data": ["seeds.jsonl"], "prompts": 6, "examples": 2, "writer": writer, "batch_size": 2}
    config = SynthesizeConfig.parse(given | changes, "synthesize")
    return synthesize(config, None, out, seed=5, device="cpu", folder=folder)


def test_prompts_are_written_answered_filtered_and_say_where_they_come_from(serve, folder):
    script = Script(until=7)
    server = serve(script)
    out = folder / "out"
    with pytest.raises(ApiError):
        run(folder, out, server)
    # six prompts; the first of three answers came in a batch that was not finished
    script.until = math.inf
    script.requests.clear()
    metrics = run(folder, out, server)
    assert len(script.requests) == 3, "no prompt is asked for again"
    rows = [json.loads(line) for line in (out / "synthetic.jsonl").open(encoding="utf-8")]
    assert [row["completion"] for row in rows] == [ANSWERS["What makes bread rise"], ANSWERS["Who was the first"].strip()]
    request = prompt_request(SEEDS, 2, 5, 0)
    assert rows[0]["provenance"] == {
        "model": "writer",
        "url": server.url,
        "temperature": 1.0,
        "max_tokens": 512,
        "seed": 5,
        "seeds": list(request.seeds),
        "request": request.text,
    }
    assert all(seed in request.text for seed in SEEDS)
    reasons = {
        row["prompt"][0]["content"]: row["reason"] for row in map(json.loads, (out / "rejected.jsonl").open(encoding="utf-8"))
    }
    assert reasons.pop(PROMPTS[2]).startswith(("near duplicate of", "duplicate of", "toxicity: score"))
    assert reasons.pop(PROMPTS[1]).startswith("near duplicate of 0000") and reasons == {"": "the model wrote nothing"}
    assert (metrics["prompts"], metrics["answers"], metrics["conversations"]) == (6, 3, 2)
    assert metrics["reasons"] == {"the model wrote nothing": 1, "near duplicate": 1, "duplicate": 1, "toxicity: score": 1}
    conversation = read_conversations(out / "synthetic.jsonl")[0]
    assert [one["content"] for one in conversation.messages] == [PROMPTS[0], ANSWERS["What makes bread rise"]]
    section = synthesize_report(StageReport(name="s", kind="synthesize", metrics=metrics, folder=out))
    assert ["near duplicate", "1"] in section.parts[2].rows


def test_the_seeds_themselves_are_answered(serve, folder):
    script = Script()
    plain = {"deduplicate": None, "clean": {"score": []}, "select": {"keep": [], "languages": []}}
    metrics = run(folder, folder / "out", serve(script), prompts=None, **plain)
    assert script.requests == SEEDS and metrics["conversations"] == 2
    rows = [json.loads(line) for line in (folder / "out" / "synthetic.jsonl").open(encoding="utf-8")]
    assert [row["provenance"]["seeds"] for row in rows] == [[0], [1]] and rows[0]["provenance"]["request"] is None


def test_prompts_and_answers_that_were_cut_are_left_out_and_counted(serve, folder):
    """A writer whose third prompt and whose answer to the first are cut, and which breaks off between two batches."""
    script = Script(until=8)

    def respond(body, number):
        status, headers, content = script(body, number)
        asked = body["messages"][-1]["content"]
        is_cut = len(script.requests) == 3 or asked == PROMPTS[0]
        if status != 200 or not is_cut:
            return status, headers, content
        (choice,) = json.loads(content)["choices"]
        return 200, {}, json.dumps({"choices": [choice | {"finish_reason": "length"}]}).encode()

    server = serve(respond)
    plain = {"deduplicate": None, "clean": {"score": []}, "select": {"keep": [], "languages": []}}
    with pytest.raises(ApiError):
        run(folder, folder / "out", server, **plain)
    script.until = math.inf
    metrics = run(folder, folder / "out", server, **plain)
    assert metrics["reasons"] == {"cut at max_tokens": 2, "the model wrote nothing": 1}
    rows, left_out = (
        [json.loads(line) for line in (folder / "out" / name).open(encoding="utf-8")]
        for name in ("synthetic.jsonl", "rejected.jsonl")
    )
    assert [row["prompt"][0]["content"] for row in rows] == [PROMPTS[1], PROMPTS[3], PROMPTS[4]]
    cut = [(row["prompt"][0]["content"], row["completion"]) for row in left_out if row["reason"] == "cut at max_tokens"]
    assert cut == [(PROMPTS[0], ANSWERS["What makes bread rise"]), (PROMPTS[2], "")]


def test_seeds_keep_their_system_message(serve, folder):
    script = Script()
    server = serve(script)
    (folder / "seeds.jsonl").write_text(json.dumps({"prompt": "Why?", "system": "Be brief."}) + "\n", encoding="utf-8")
    plain = {"deduplicate": None, "clean": {"score": []}, "select": {"keep": [], "languages": []}}
    run(folder, folder / "out", server, prompts=None, **plain)
    assert [one["content"] for one in server.requests[0][2]["messages"]] == ["Be brief.", "Why?"]


def test_what_cannot_work_is_said(serve, folder):
    with pytest.raises(ConfigError, match=r"select needs the score gopher_quality; add it to clean.score"):
        SynthesizeConfig.parse({"data": ["a.jsonl"], "select": {"keep": ["gopher_quality"], "languages": []}}, "synthesize")
    with pytest.raises(ConfigError, match="there is no model to write with: name a writer"):
        synthesize(SynthesizeConfig(data=["seeds.jsonl"]), None, folder, seed=1, folder=folder)
    silent = serve(lambda *_: completion(" "))
    with pytest.raises(SourceError, match=r"none of 6 conversations is left: the model wrote nothing \(6\)"):
        run(folder, folder / "none", silent)


def test_a_model_of_this_machine_writes_and_is_named_by_its_files(model_folder, folder):
    (folder / "seeds.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n', encoding="utf-8")
    plain = {"deduplicate": None, "clean": {"score": []}, "select": {"keep": [], "languages": []}}
    config = SynthesizeConfig.parse({"data": ["seeds.jsonl"], "max_tokens": 64, **plain}, "synthesize")
    model = ending_soon(model_folder, folder / "model")
    for out in ("one", "other"):
        synthesize(config, model, folder / out, seed=5, device="cpu", folder=folder)
    (first, *_) = map(json.loads, (folder / "one" / "synthetic.jsonl").open(encoding="utf-8"))
    assert first["provenance"]["model"] is None and len(first["provenance"]["files"]) == 32
    assert (folder / "one" / "synthetic.jsonl").read_bytes() == (folder / "other" / "synthetic.jsonl").read_bytes()


def test_a_fence_around_a_written_prompt_is_no_part_of_it():
    assert without_fence("=====\nWhat is\n= this?\n =====\n\n") == "What is\n= this?"
    assert without_fence("=====\n") == ""
