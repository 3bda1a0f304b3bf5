"""The pages of runs and data, and where a token comes from: by their API, and in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

import bessemer
from bessemer.core.errors import ArtefactError
from bessemer.core.store import Store
from bessemer.data.corpus.reader import TRAIN, VALIDATION, count_documents, iterate_documents
from bessemer.inference.engine import Engine
from bessemer.pipeline.model_card import model_card
from bessemer.pipeline.run_folder import RunFolder
from bessemer.serving.runtime.clients import KeyRecord, hash_key, new_key, write_keys
from bessemer.serving.runtime.models import ModelPool
from bessemer.webapp.app import WebSettings, web_pages
from bessemer.webapp.origins import example_files, verdict_of
from tests.cases import slow
from tests.serving.running import servers
from tests.webapp.test_accessibility import faults

RECIPE = """
format: 1
name: small
description: Looked at while it is made
collect:
  - {source: files, paths: texts.jsonl}
clean: {score: [language, gopher_quality]}
deduplicate: [exact]
select: {keep: gopher_quality, thresholds: {gopher_words: {min: 30}}}
tokenize: {vocab_size: 320}
model: {preset: qwen3-1m, num_hidden_layers: 2, hidden_size: 64, intermediate_size: 128, max_position_embeddings: 256}
pretrain: {steps: 30, batch_size: 4, context_length: 64, dtype: float32, compile: false, threads: 1,
  evaluate_every: 8, evaluate_tokens: 1024, checkpoint_minutes: 1000, checkpoint_every: 12, sample_prompts: [The]}
"""
SENTENCE = "The furnace of the steel works has to be heated with care and the masters know of {n} ways to tell that it is hot. "


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    texts = [SENTENCE.format(n=number) * (1 + number % 4) for number in range(120)]
    texts += [texts[3], "Too short."]
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts))
    (folder / "small.yaml").write_text(RECIPE, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        bessemer.run("small.yaml")
    finally:
        os.chdir(before)
    return folder / "runs"


@pytest.fixture(scope="module")
def made(runs) -> Engine:
    return Engine((runs / "small" / "model").resolve(), device="cpu")


@pytest.fixture(scope="module")
def url(runs, made):
    with servers() as start:
        yield start(made, web_pages(WebSettings((runs / "small" / "model").resolve(), runs=runs, run="small")))


def get(url, path, **parameters):
    answer = httpx.get(f"{url}/inspect/{path}", params=parameters, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_run_is_told_with_its_stages_figures_and_sections(url):
    (run,) = get(url, "runs")["runs"]
    assert (run["name"], run["done"], run["stages"], run["at_work"]) == ("small", 7, 7, None)
    stages = {stage["name"]: stage for stage in get(url, "runs/small")["stages"]}
    assert stages["pretrain"]["metrics"] and stages["pretrain"]["samples"] and stages["select"]["documents"]
    assert stages["pretrain"]["feeds"] == ["tokenize", "model"] or set(stages["pretrain"]["feeds"]) == {"tokenize", "model"}
    assert any(figure["label"] == "parameters" for figure in get(url, "runs/small/figures")["figures"])
    section = get(url, "runs/small/stages/pretrain/section")
    assert section["title"] and "<svg" in section["html"] and " style=" not in section["html"]
    report = httpx.get(f"{url}/inspect/runs/small/report")
    assert report.status_code == 200 and report.headers["content-security-policy"].startswith("sandbox;")


def test_of_a_file_that_grows_only_what_is_new_is_sent(url, runs):
    first = get(url, "runs/small/stages/pretrain/metrics")
    assert [record["step"] for record in first["records"] if "loss" in record][-1] == 30 and not first["more"]
    assert get(url, "runs/small/stages/pretrain/metrics", after=first["after"])["records"] == []
    path = (runs / "small" / "stages" / "pretrain").resolve() / "metrics.jsonl"
    before = path.read_bytes()
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 31, "loss": NaN}\n{"step": 32, "lo')
    found = get(url, "runs/small/stages/pretrain/metrics", after=first["after"])
    assert found["records"] == [{"step": 31, "loss": None}] and not found["restarted"]
    # a run that went on from an earlier step wrote another file
    other = path.with_suffix(".other")
    other.write_bytes(before)
    other.replace(path)
    again = get(url, "runs/small/stages/pretrain/metrics", after=found["after"])
    assert again["restarted"] and again["records"] == first["records"]


def test_documents_are_searched_explained_and_their_way_is_told(url):
    folders = {one["stage"]: one for one in get(url, "documents/small")["folders"]}
    assert folders["select"].keys() == {"stage", "documents", "rejected"} and "rejected" not in folders["collect"]
    dropped = get(url, "documents/small/select/rejected", text="too SHORT")
    (row,) = dropped["rows"]
    assert row["reason"] and dropped["next"] is None
    rules = dict(get(url, "documents/small/select/rejected/facets")["rules"])
    assert sum(rules.values()) == folders["select"]["rejected"]
    (group,) = get(url, "documents/small/deduplicate/rejected/duplicates")["groups"]
    assert group["members"] == 1 and group["some"][0]["wording"] == "duplicate"
    told = get(url, f"documents/small/{row['id']}")
    assert [(one["stage"], one["side"]) for one in told["history"]][-1] == ("select", "rejected")
    assert told["explanation"]["is_kept"] is False and "".join(told["tokens"]) == told["text"] == "Too short."
    longest = get(
        url, "documents/small/select/documents", order="gopher_words", column="gopher_words", descending=True, limit=3
    )
    assert [row["gopher_words"] for row in longest["rows"]] == [100.0, 100.0, 100.0]


def test_earlier_models_and_training_documents_of_a_token(url, made):
    ids = made.tokenizer.encode("The furnace of the steel works has")
    earlier = httpx.post(f"{url}/inspect/earlier", json={"before": ids[:-1], "token": ids[-1]}, timeout=60).json()["models"]
    assert [(one["stage"], one["step"]) for one in earlier][:3] == [("model", None), ("pretrain", 12), ("pretrain", 24)]
    assert (earlier[-1]["stage"], earlier[-1]["step"]) == ("pretrain", None)
    assert earlier[-1]["rank"] < earlier[0]["rank"]
    asked = {"model": "tiny", "before": ids[:-1], "token": ids[-1]}
    now = httpx.post(f"{url}/inspect/token", json=asked, timeout=60).json()["token"]
    assert earlier[-1]["rank"] == now["rank"] and earlier[-1]["probability"] == pytest.approx(now["probability"], rel=1e-2)
    found = httpx.post(f"{url}/inspect/training", json={"before": ids[:-1], "token": ids[-1]}, timeout=60).json()
    assert found["stage"] == "select" and found["passages"][0]["found"].endswith("steel works has")
    assert found["passages"][0]["scores"]["gopher_words"] >= 30


def test_an_answer_grows_likely_from_the_untrained_model_to_the_last(url, made):
    ids = made.tokenizer.encode("The furnace of the steel works has to be heated with care")
    asked = {"before": ids[:3], "ids": ids[3:]}
    with httpx.stream("POST", f"{url}/inspect/growth", json=asked, timeout=60) as answer:
        told = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: ")]
    assert [one["progress"] for one in told][-1] == 1
    untrained, *_, last = told
    assert (untrained["stage"], last["stage"], last["step"]) == ("model", "pretrain", None)
    # each model's own probability, one token at a time
    earlier = httpx.post(f"{url}/inspect/earlier", json={"before": ids[:8], "token": ids[8]}, timeout=60).json()["models"]
    for grown, one in zip(told, earlier, strict=True):
        assert grown["probabilities"][5] == pytest.approx(one["probability"], rel=1e-3)
    assert sum(last["probabilities"]) > sum(untrained["probabilities"])
    # where the answer alone is longer than the context, the first tokens have none
    long = {"before": ids[:3], "ids": (ids[3:] * 30)[:260]}
    with httpx.stream("POST", f"{url}/inspect/growth", json=long, timeout=60) as answer:
        line = next(line for line in answer.iter_lines() if line.startswith("data: "))
    shares = json.loads(line.removeprefix("data: "))["probabilities"]
    assert len(shares) == 260 and shares[:5] == [None] * 5 and None not in shares[5:]
    assert httpx.post(f"{url}/inspect/growth", json={"before": [1], "ids": [10**6]}).status_code == 400


def test_the_words_of_an_answer_are_found_in_documents_with_their_verdict(url, made):
    ids = made.tokenizer.encode("Some say the furnace of the steel works has to be heated with care, and nobody else knows it")
    found = httpx.post(f"{url}/inspect/origins", json={"before": ids[:1], "ids": ids}, timeout=60).json()
    (span,) = found["spans"]
    assert found["text"][span["start"] : span["end"]] == "furnace of the steel works has to be heated with"
    assert span["in_documents"] > 20 and found["looked_at"] == found["documents"]
    place = span["documents"][0]
    assert place["split"] == TRAIN and place["left"].endswith("The ") and place["right"].startswith(" care and")
    assert re.search(r"kept: .*[≥≤] ", place["verdict"]), place
    words = [
        SimpleNamespace(column="gopher_words", value=212.0, limit=(50, None)),
        SimpleNamespace(column="x", value=None, limit=(1, 2)),
    ]
    assert verdict_of(words) == "kept: gopher: words 212 ≥ 50"


def test_the_training_data_of_a_token_is_without_the_documents_that_were_held_out(url, made, runs):
    held_out = [*iterate_documents(runs / "small" / "stages" / "select" / "documents", split=VALIDATION)]
    (text, *_) = [text for batch in held_out for text in batch.column("text").to_pylist()]
    # its own number stands in it alone
    number = re.search(r"know of \d+", text)[0]
    ids = made.tokenizer.encode(text[: text.index(number) + len(number) + 5])
    found = httpx.post(f"{url}/inspect/training", json={"before": ids[:-1], "token": ids[-1]}, timeout=60).json()
    assert found["passages"] and not any(number + " ways" in one["found"] + one["right"] for one in found["passages"])
    rows = count_documents(runs / "small" / "stages" / "select" / "documents", TRAIN)
    assert found["documents"] == rows < count_documents(runs / "small" / "stages" / "select" / "documents")


def test_of_a_model_beside_the_first_no_other_models_past_is_told(runs, made):
    folder = (runs / "small" / "model").resolve()
    beside = ModelPool({"other": folder}, lambda place: Engine(place, device="cpu"), max_waiting=4)
    with servers() as start:
        pages = web_pages(WebSettings(folder, runs=runs, run="small"))
        url = start(made, pages, pool=beside, aliases=["mine"])
        ids = made.tokenizer.encode("The furnace of the steel works has")
        for path in ("earlier", "training"):
            asked = {"before": ids[:-1], "token": ids[-1]}
            status = {
                name: httpx.post(f"{url}/inspect/{path}", json=asked | {"model": name}, timeout=60).status_code
                for name in ("tiny", "mine", "other")
            }
            assert status == {"tiny": 200, "mine": 200, "other": 404}
        assert json.loads(re.search(r'id="given"[^>]*>(.*?)</script>', httpx.get(url).text)[1])["made"] == ["tiny", "mine"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("runs/..", 404),
        ("runs/%2e%2e%2fsmall", 404),
        ("runs/small/stages/nothing/metrics", 404),
        ("runs/small/stages/pretrain/weights", 404),
        ("documents/small/pretrain/documents", 404),
        ("documents/small/..%2f..%2fetc/documents", 404),
        ("documents/small/select/documents?low=much", 400),
        ("documents/small/select/documents?order=text", 404),
        ("documents/small/" + "0" * 32, 404),
        ("documents/small/nothing", 404),
        ("evaluations/beside?first=a&second=b", 404),
        ("evaluations/beside", 400),
    ],
)
def test_what_is_not_there_is_said_and_nothing_else_is_reached(url, path, status):
    answer = httpx.get(f"{url}/inspect/{path}")
    assert answer.status_code == status and answer.json()["error"]["message"], answer.text


def test_runs_and_documents_are_an_admins(runs, made, tmp_path):
    keys, user, admin = tmp_path / "keys.json", new_key(), new_key()
    write_keys(keys, [KeyRecord(name="user", hash=hash_key(user)), KeyRecord(name="admin", hash=hash_key(admin), admin=True)])
    with servers() as start:
        url = start(made, web_pages(WebSettings(runs=runs, run="small")), keys=keys)
        for path in ("runs", "documents/small", "runs/small/report"):
            by = {key: httpx.get(f"{url}/inspect/{path}", headers={"x-api-key": key}).status_code for key in (user, admin)}
            assert by == {user: 403, admin: 200}
            assert httpx.get(f"{url}/inspect/{path}").status_code == 401
        without = start(made, web_pages(WebSettings()))
        assert httpx.get(f"{without}/inspect/runs").status_code == 403


def test_a_server_without_pictures_or_filters_says_what_it_lacks_and_shows_the_rest(url, monkeypatch):
    for module in ("bessemer.views.report", "bessemer.data.stages.explain"):
        monkeypatch.setitem(sys.modules, module, None)
    assert get(url, "runs")["runs"] and get(url, "runs/small")["stages"]
    answer = httpx.get(f"{url}/inspect/runs/small/stages/pretrain/section")
    assert answer.status_code == 404 and "pip install" in answer.json()["error"]["message"]
    (row,) = get(url, "documents/small/select/rejected", text="too short")["rows"]
    told = get(url, f"documents/small/{row['id']}")
    assert told["explanation"] is None and "pip install" in told["problem"] and told["history"]


def test_a_runs_model_has_a_card_from_its_manifests(runs, tmp_path):
    card = model_card(RunFolder(runs, "small"))
    record = json.loads((runs / "small" / "run.json").read_text(encoding="utf-8"))
    for name, entry in record["stages"].items():
        assert f"| `{name}` | `{entry['key']}` |" in card
    assert card.startswith("---\npipeline_tag: text-generation") and "layers 2" in card
    assert "No red team has attacked it" in card
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_text(
        json.dumps(record | {"name": "bare", "recipe": {}, "stages": {}}), encoding="utf-8"
    )
    with pytest.raises(ArtefactError, match=r"^bare: no stage of this run has made a model"):
        model_card(RunFolder(tmp_path, "bare"))


@pytest.fixture
def page(url, page):
    """The page of a browser, which is closed before the server: it asks again and again."""
    return page


# --- in a browser ---------------------------------------------------------------------------------------------------


def test_the_curve_of_a_live_run_grows_and_only_what_is_new_is_fetched(page, url, runs):
    live = runs / "live"
    shutil.rmtree(live, ignore_errors=True)
    shutil.copytree(runs / "small", live, symlinks=True)
    (live / "stages" / "pretrain").unlink()
    store, key = Store(runs / ".store"), "pretrain-live"
    partial = store.partial(key)
    partial.mkdir(exist_ok=True)
    (live / "working.json").write_text(
        json.dumps({"stage": "pretrain", "key": key, "started": "", "steps": 400}), encoding="utf-8"
    )
    sent = []
    page.on("response", lambda answer: sent.append(answer) if "/pretrain/metrics" in answer.url else None)

    def grow(first, last):
        with (partial / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"step": step, "loss": 400 / step}) + "\n" for step in range(first, last))

    with store.lock(key):
        grow(1, 101)
        page.goto(f"{url}/runs?run=live")
        page.wait_for_selector("figure[aria-label^='loss of pretrain over 100 steps']")
        page.wait_for_selector("li.running >> text=step 100 of 400")
        grow(101, 201)
        page.wait_for_selector("figure[aria-label='loss of pretrain over 200 steps, from 400 to 2']")
        assert page.locator("figure.chart").count() == 1
    steps = [record["step"] for answer in sent for record in answer.json()["records"]]
    assert steps == list(range(1, 201))
    page.wait_for_selector("li.interrupted", timeout=15_000)
    shutil.rmtree(live)
    shutil.rmtree(partial)


def test_a_run_is_read_beside_another_and_its_stages_are_opened(page, url, runs):
    other = runs / "other"
    shutil.copytree(runs / "small", other, symlinks=True)
    page.goto(f"{url}/runs")
    page.click("text=small >> nth=0")
    page.wait_for_selector("figure.chart")
    page.select_option("[name=other]", "other")
    page.wait_for_selector("#beside >> text=Figures")
    page.click("#sections summary >> text=select")
    page.wait_for_selector("#sections h3")
    page.wait_for_selector("#texts .prompt >> text=The")
    page.goto(page.url)
    page.wait_for_selector("#beside >> text=Figures")
    assert page.input_value("[name=other]") == "other"
    shutil.rmtree(other)


def test_a_document_is_found_and_opened_and_has_an_address(page, url):
    page.goto(f"{url}/data")
    page.wait_for_selector("#documents li")
    page.select_option("[name=folder]", "select/rejected")
    page.wait_for_selector("#documents .failure")
    page.fill("[name=text]", "too short")
    page.click("text=Search")
    page.wait_for_selector("#documents mark >> text=Too short")
    page.click("#documents .open")
    page.wait_for_selector("#document >> text=drops it")
    # a document without an address
    assert "null" not in page.inner_text("#document")
    page.goto(page.url)
    page.wait_for_selector("#document >> text=drops it")


def test_a_token_is_followed_to_earlier_models_and_to_its_documents(page, url):
    page.goto(url)
    page.wait_for_selector("[name=model] option", state="attached")
    page.evaluate(
        "document.querySelector('[name=max_tokens]').value = 6; document.querySelector('[name=temperature]').value = 0"
    )
    page.fill("#prompt", "The furnace of the steel")
    page.press("#prompt", "Enter")
    page.click("article.assistant:not(.working) >> text=Tokens")
    page.click("text=Through the checkpoints")
    page.wait_for_selector(".growth[data-model='pretrain']")
    colours = "[...document.querySelectorAll('.tokens button')].map((button) => button.style.backgroundColor)"
    last = page.evaluate(colours)
    page.get_by_role("slider", name="Model of the run").press("Home")
    page.wait_for_selector(".growth[data-model='model']")
    assert page.evaluate(colours) != last and " → " in page.inner_text(".reading")
    page.click("text=Where the words come from")
    page.wait_for_selector(".origins[data-done]")
    assert faults(page) == []
    page.set_viewport_size({"width": 400, "height": 800})
    assert faults(page) == []
    page.set_viewport_size({"width": 1280, "height": 800})
    page.click("text=Ask the earlier models")
    page.wait_for_selector("#token-lineage td >> text=pretrain, step 12")
    page.click(".tokens.pressable button >> nth=3")
    page.wait_for_selector("#side[data-place='3']")
    page.click("text=Look for the words before it")
    page.wait_for_selector("#token-lineage p >> text=documents of select")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("two words", "The answer has fewer than four words: too few to look for."),
        slow("four words of it", "No four words of the answer in a row stand in 86 training documents."),
    ],
)
def test_of_an_answer_without_spans_it_is_said_why(page, url, text, said):
    looked_at = 0 if text == "two words" else 86
    found = {"run": "small", "stage": "select", "text": text, "spans": [], "looked_at": looked_at, "documents": 86, "rows": 0}
    page.route("**/inspect/origins", lambda route: route.fulfill(json=found))
    page.goto(url)
    page.evaluate(f"import('{url}/static/origins.js').then((own) => document.body.append(own.origins({{}})))")
    page.click("text=Where the words come from")
    page.wait_for_selector(".origins[data-done]")
    assert page.inner_text(".origins .soft") == said


@pytest.mark.parametrize("path", [slow("runs"), "runs?run=small", slow("data?run=small")])
def test_these_pages_have_no_serious_fault_for_those_who_do_not_see_them(page, url, path):
    page.goto(f"{url}/{path}")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(200)
    assert faults(page) == []


def test_examples_of_a_run_are_those_that_its_stages_kept_or_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sft/conversations/train.jsonl", "judged/preferences.jsonl", "pairs.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    recipe = {
        "name": "r",
        "sft": {"data": ["chats.jsonl"]},
        "judged": {"kind": "ai_preferences"},
        "align": {"kind": "preference", "data": ["pairs.jsonl", "made/preferences", "gone.jsonl"]},
        "reward": {"data": ["pairs.jsonl"]},
    }
    stages = {name: tmp_path / name for name in ("sft", "judged", "align")}
    run = SimpleNamespace(record=lambda: {"recipe": recipe}, stages=lambda: stages)
    assert [(one.stage, one.kind, one.path.name, one.is_split) for one in example_files(run)] == [
        ("sft", "sft", "train.jsonl", True),
        ("judged", "ai_preferences", "preferences.jsonl", False),
        ("align", "preference", "pairs.jsonl", False),
    ]
