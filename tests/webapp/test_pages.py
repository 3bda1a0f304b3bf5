"""The pages and their files as a client without a browser sees them, and what they ask of the server."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from fastapi import FastAPI

from bessemer.core.records import json_lines
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.inspection.inspect import inspect
from bessemer.inspection.recording import logit_lens, record
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.data.examples import read_examples
from bessemer.posttraining.data.formats import as_labelled, as_pair
from bessemer.serving.app import create_app
from bessemer.serving.config import ServingConfig
from bessemer.serving.runtime.bodies import ApiError, without_places
from bessemer.serving.runtime.clients import KeyRecord, hash_key, new_key, write_keys
from bessemer.webapp import model_copy, xray_api
from bessemer.webapp.app import WebSettings, web_pages
from bessemer.webapp.feedback import FeedbackApi
from bessemer.webapp.preference_runs import PreferenceRuns
from tests.serving.running import servers


def test_pages_and_their_files_need_no_key_and_all_that_they_ask_does(engine, start, model_folder):
    url = start(api_key="secret", web={"suggestions": ["</script><script>alert(1)</script>"]})
    page = httpx.get(url)
    assert page.headers["content-type"].startswith("text/html") and "alert(1)" in page.text and "<script>alert" not in page.text
    assert (
        "script-src 'self'" in page.headers["content-security-policy"]
        and "unsafe" not in page.headers["content-security-policy"]
    )
    files = set(re.findall(r'(?:src|href)="(static/[^"]+)"', page.text + httpx.get(url + "/xray").text))
    assert len(files) >= 5
    for file in files:
        found = httpx.get(f"{url}/{file}")
        assert found.status_code == 200
        assert httpx.get(f"{url}/{file}", headers={"If-None-Match": found.headers["etag"]}).status_code == 304
    for path in ("/static/../app.py", "/static/", "/static/..%2fapp.py", "/static/chat.js/x"):
        assert httpx.get(url + path).status_code in (401, 404)
    app = create_app(engine, "tiny", ServingConfig(), web_pages(WebSettings(model_folder)))
    asked = [path for path in app.openapi()["paths"] if path.startswith(("/inspect", "/feedback"))]
    assert len(asked) >= 5
    for path in asked:
        assert httpx.post(url + path, json={}).status_code == 401


MODULES = (
    "page",
    "store",
    "markdown",
    "colouring",
    "token",
    "chat",
    "settings",
    "answers",
    "sampled",
    "comparisons",
    "documents",
)


def test_nothing_in_the_pages_is_from_elsewhere_or_parses_what_others_say(start):
    url = start()
    for page in ("/", "/xray"):
        text = httpx.get(url + page).text
        files = re.findall(r'(?:src|href)="(static/[^"]+)"', text)
        modules = [httpx.get(f"{url}/static/{name}.js").text for name in MODULES]
        for content in (text, *(httpx.get(f"{url}/{file}").text for file in files), *modules):
            for forbidden in ("innerHTML", "outerHTML =", "insertAdjacentHTML", "document.write", "eval(", "@import", "//cdn"):
                assert forbidden not in content
        assert "http://" not in text and "https://" not in text


def test_this_token_is_what_the_model_says_of_it(start, model_folder):
    url = start()
    model, tokenizer = load_model(model_folder), Engine(model_folder).tokenizer
    before = tokenizer.encode("the end in the thin")
    settings = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    asked = {"model": "tiny", "before": before, "token": 7, "attention": {"layer": 1, "head": 2}, **settings}
    found = httpx.post(url + "/inspect/token", json=asked).json()
    with torch.no_grad():
        share_V = model(torch.tensor([before]))[0, -1, : tokenizer.vocab_size].softmax(-1)
    likeliest = share_V.topk(5)
    assert [one["id"] for one in found["alternatives"][:5]] == likeliest.indices.tolist()
    assert found["alternatives"][0]["probability"] == pytest.approx(float(likeliest.values[0]), abs=1e-5)
    assert found["entropy_bits"] == pytest.approx(float(-(share_V * share_V.log2()).sum()), abs=1e-4)
    assert found["token"]["rank"] == int((share_V > share_V[7]).sum()) + 1
    assert 1 <= found["kept"] <= 5 and sum(one["sampled"] for one in found["alternatives"]) == pytest.approx(1, abs=1e-5)
    recording = record(model, before)
    lens = logit_lens(model, recording, before)
    expected = [float(row) for row in lens.probabilities_LTk[:, -1, 0]]
    assert [row["likeliest"][0]["probability"] for row in found["lens"]] == pytest.approx(expected, abs=1e-4)
    weights = recording.heads[1].weights_BHTT[0, 2, -1]
    assert found["attention"] == pytest.approx(weights.tolist(), abs=1e-4)


def test_greedy_sampling_draws_one(start, engine):
    found = httpx.post(start() + "/inspect/token", json={"model": "tiny", "before": [1, 2], "temperature": 0}).json()
    assert found["kept"] == 1 and found["alternatives"][0]["sampled"] == 1 and found["token"] is None


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"before": []}, "before"),
        ({"before": [10**6]}, "before"),
        ({"before": [-1]}, "before[0]"),
        ({"before": [1] * 5000}, "before"),
        ({"attention": {"layer": 99, "head": 0}}, None),
        ({"temperature": 1e309}, "temperature"),
        ({"model": "other"}, "model"),
    ],
)
def test_a_wrong_token_is_one_line(start, changes, parameter):
    asked = json.dumps({"model": "tiny", "before": [1, 2]} | changes)
    answer = httpx.post(start() + "/inspect/token", content=asked)
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == parameter


def test_an_xray_is_an_inspection_and_a_silenced_head_changes_what_is_said(start, model_folder, engine):
    url = start()
    found = httpx.post(url + "/inspect/xray", json={"text": "the end in the thin"}, timeout=60).json()
    names = [section["name"] for section in found["sections"]]
    assert names[:3] == ["tokens", "attention", "head"] and {"lens", "ablation", "embedding"} <= set(names)
    expected = inspect(load_model(model_folder), engine.tokenizer, "the end in the thin")
    assert found["figures"][-1]["value"] == f"{expected.loss:.2f}"
    worst = found["hurts_most"]
    assert expected.head_changes_LH[worst["layer"], worst["head"]] == pytest.approx(expected.head_changes_LH.max())
    both = httpx.post(url + "/inspect/without", json={"text": "the end", **worst}, timeout=60).json()
    assert (
        both["whole"] == engine.generate(["the end"], SamplingParams(max_tokens=24, temperature=0.0))[0].text
        and both["without"] != both["whole"]
    )
    wrong = httpx.post(url + "/inspect/xray", json={"text": "the end", "query": "nowhere"}, timeout=60)
    assert wrong.status_code == 400 and "no token of the text" in wrong.json()["error"]["message"]
    assert httpx.post(url + "/inspect/xray", json={"text": "a " * 2000}).status_code == 400


def test_an_xray_comes_in_parts_and_the_last_is_the_whole(start):
    url = start()
    asked = {"text": "the end in the thin"}
    whole = httpx.post(url + "/inspect/xray", json=asked, timeout=60).json()
    with httpx.stream("POST", url + "/inspect/xray", json=asked | {"stream": True}, timeout=60) as answer:
        told = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: ")]
    progress = [one["progress"] for one in told if "progress" in one]
    first, second, last = (one for one in told if "sections" in one)
    assert progress == sorted(progress) and progress[0] == 0 and last == whole
    names = [{one["name"] for one in part["sections"]} for part in (first, second, last)]
    assert names[2] - names[1] == {"ablation"} and names[1] - names[0] == {"roles"} and {"attention", "lens"} <= names[0]
    refused = httpx.post(url + "/inspect/xray", json={"text": "a " * 2000, "stream": True})
    assert refused.status_code == 400
    with httpx.stream("POST", url + "/inspect/xray", json=asked | {"stream": True, "query": "nowhere"}, timeout=60) as answer:
        assert "no token of the text" in answer.read().decode()


def test_xrays_take_no_thread_of_the_server_and_stop_when_their_clients_leave(start, monkeypatch):
    url, may_go_on = start(), threading.Event()
    begun, computed = [], []

    def held(model, tokenizer, text, **settings):
        begun.append(text)
        assert may_go_on.wait(30)
        with torch.no_grad():
            model(torch.tensor([[1, 2]]))
        computed.append(text)
        return inspect(model, tokenizer, text, **settings)

    monkeypatch.setattr(xray_api, "inspect", held)
    address = httpx.URL(url)
    request = b"POST /inspect/xray HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
    left = [socket.create_connection((address.host, address.port)) for _ in range(8)]
    for number, connection in enumerate(left):
        body = json.dumps({"text": f"the end {number}"}).encode()
        connection.sendall(request % (len(body), body))
    wait_for(lambda: requests_of(url) == 8)
    assert httpx.post(url + "/inspect/xray", json={"text": "one more"}).status_code == 503
    # eight that wait would hold all threads that the server shares, on a machine of up to four cores
    assert httpx.post(url + "/tokenize", json={"prompt": "the end"}).status_code == 200
    for connection in left:
        connection.close()
    wait_for(lambda: requests_of(url) == 0)
    may_go_on.set()
    assert httpx.post(url + "/inspect/xray", json={"text": "the last"}, timeout=60).status_code == 200
    assert len(begun) == 2 and computed == begun[1:] == ["the last"]


def requests_of(url):
    return httpx.get(url + "/health").json()["requests"]


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until


def test_an_xray_is_refused_where_its_copy_of_the_model_does_not_fit_or_anybody_could_ask(start, monkeypatch):
    monkeypatch.setattr(model_copy, "free_memory_bytes", lambda: 1000)
    monkeypatch.setattr(model_copy, "load_whole", None)
    refused = httpx.post(start(web={}) + "/inspect/xray", json={"text": "the end"})
    assert refused.status_code == 503 and "copy of the model in float32" in refused.json()["error"]["message"]
    for path, more in (("xray", {}), ("without", {"layer": 0, "head": 0})):
        refused = httpx.post(f"{start(web={'makes_xrays': False})}/inspect/{path}", json={"text": "the end", **more})
        assert refused.status_code == 403 and "asks for no key" in refused.json()["error"]["message"]


def test_a_gguf_file_is_seen_from_inside_too(model_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        xray_api, "inspect", lambda model, *rest, **more: (seen.append(model), inspect(model, *rest, **more))[1]
    )
    export_gguf(model_folder, tmp_path / "tiny.gguf", "q8_0")
    with Engine(tmp_path / "tiny.gguf", device="cpu") as engine, servers() as begin:
        url = begin(engine, web_pages(WebSettings(tmp_path / "tiny.gguf")))
        found = httpx.post(url + "/inspect/xray", json={"text": "the end"}, timeout=60).json()
        expected = inspect(load_model(tmp_path / "tiny.gguf").float(), engine.tokenizer, "the end")
        assert found["figures"][-1]["value"] == f"{expected.loss:.2f}"
        # a copy that kept its codes would dequantise a weight at every product
        assert not is_quantised(seen[0]) and seen[0].dtype == torch.float32
        asked = {"text": "the end", "layer": 0, "head": 0}
        assert httpx.post(url + "/inspect/without", json=asked, timeout=60).json()["whole"]


def test_feedback_becomes_rows_that_post_training_reads(start, tmp_path):
    url = start(web={"feedback": tmp_path / "said"})
    prompt = [{"role": "user", "content": "Where is it?"}]
    pair = {"prompt": prompt, "chosen": "Here.", "rejected": "There."}
    label = {"prompt": prompt, "completion": "Here.", "label": False}
    for row in (pair, label):
        assert httpx.post(url + "/feedback", json=row).status_code == 200
    (read,) = read_examples(tmp_path / "said" / "pairs.jsonl", as_pair)
    assert (read.chosen[-1]["content"], read.rejected[-1]["content"]) == ("Here.", "There.")
    assert json.loads((tmp_path / "said" / "labels.jsonl").read_text(encoding="utf-8"))["label"] is False
    for wrong in (
        pair | {"label": True, "completion": "a"},
        {"prompt": prompt},
        pair | {"rejected": "Here."},
        {**pair, "prompt": []},
    ):
        assert httpx.post(url + "/feedback", json=wrong).status_code == 400
    assert httpx.post(start() + "/feedback", json=pair).status_code == 403


def test_feedback_with_a_key_lies_in_the_folder_of_its_user(start, tmp_path):
    keys, ann, bob = tmp_path / "keys.json", new_key(), new_key()
    records = [KeyRecord(name="laptop", user="ann", hash=hash_key(ann)), KeyRecord(name="../bob", hash=hash_key(bob))]
    write_keys(keys, records)
    url = start(web={"feedback": tmp_path / "people"}, keys=keys)
    row = {"prompt": [{"role": "user", "content": "Where?"}], "chosen": "Here.", "rejected": "There."}
    for key, status in ((ann, 200), (bob, 403)):
        assert httpx.post(url + "/feedback", json=row, headers={"Authorization": f"Bearer {key}"}).status_code == status
    assert [str(path.relative_to(tmp_path)) for path in (tmp_path / "people").rglob("*.jsonl")] == ["people/ann/pairs.jsonl"]


def test_an_answer_has_one_label_the_last_and_none_once_it_is_taken_back(start, tmp_path):
    url, labels = start(web={"feedback": tmp_path}), tmp_path / "labels.jsonl"
    # a line separator ends no line of JSON
    prompt = [{"role": "user", "content": "Where\u2028is it?"}]
    for identity, label in (("a-1", True), ("b", True), ("a-1", False)):
        row = {"prompt": prompt, "completion": "Here.", "label": label, "id": identity}
        assert httpx.post(url + "/feedback", json=row).status_code == 200
    assert [(row["id"], row["label"]) for row in json_lines(labels.read_text(encoding="utf-8"))] == [
        ("b", True),
        ("a-1", False),
    ]
    assert [example.is_desirable for example in read_examples(labels, as_labelled)] == [True, False]
    assert httpx.delete(url + "/feedback/a-1").json() == {"deleted": True}
    assert httpx.delete(url + "/feedback/a-1").json() == {"deleted": False}
    assert [row["id"] for row in json_lines(labels.read_text(encoding="utf-8"))] == ["b"]


def test_of_two_who_start_training_at_the_same_moment_one_is_refused(monkeypatch, tmp_path):
    class Running:
        def poll(self):
            return None

    def start(self, *_):
        time.sleep(0.2)
        self._running = Running()
        return {"run": "preferences-1"}

    monkeypatch.setattr(PreferenceRuns, "_start", start)
    started = PreferenceRuns(tmp_path, FeedbackApi(tmp_path), tmp_path)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(started._start_alone, tmp_path, tmp_path, tmp_path) for _ in range(2)]
    refused = [one.exception() for one in both if one.exception() is not None]
    assert [error.status for error in refused] == [409] and isinstance(refused[0], ApiError)


def test_training_on_feedback_is_started_by_whom_runs_are_shown_and_with_enough_of_it(start, tmp_path):
    people, runs = tmp_path / "people", tmp_path / "runs"
    row = {"prompt": [{"role": "user", "content": "Where?"}], "chosen": "Here.", "rejected": "There."}

    def refused(url, **headers):
        answer = httpx.post(url + "/feedback/train", json={}, headers=headers)
        return answer.status_code, answer.json()["error"]["message"]

    url = start(web={"feedback": people, "runs": runs})
    assert httpx.post(url + "/feedback", json=row).status_code == 200
    assert refused(url) == (400, "there are 1 pairs, and 8 are needed: go on comparing")
    assert '"trains": true' in httpx.get(url).text
    for web in ({"feedback": people}, {"runs": runs}):
        url = start(web=web)
        assert refused(url)[0] == 403 and '"trains": false' in httpx.get(url).text
    keys, key = tmp_path / "keys.json", new_key()
    write_keys(keys, [KeyRecord(name="ann", hash=hash_key(key))])
    url = start(web={"feedback": people, "runs": runs}, keys=keys)
    assert refused(url, Authorization=f"Bearer {key}") == (403, "runs and their documents are shown with an admin key")
    assert not runs.exists()


def test_the_description_of_the_api_has_the_routes_of_the_pages(start, engine, model_folder):
    app = create_app(engine, "tiny", ServingConfig(), web_pages(WebSettings(model_folder)))
    routes = FastAPI.openapi(app)["paths"]
    described = httpx.get(start() + "/openapi.json").json()["paths"]
    wanted = {(re.sub(r":path\}", "}", path), method) for path, methods in routes.items() for method in methods}
    assert wanted - {("/", "head"), ("/", "get")} == {(path, method) for path in described for method in described[path]}


def test_where_files_lie_is_not_said(tmp_path):
    text = f"{tmp_path}/a/config.json and {tmp_path}/model.gguf: no; POST /v1/chat/completions, 1/2 and https://a.org/b/c"
    assert without_places(text) == "config.json and model.gguf: no; POST /v1/chat/completions, 1/2 and https://a.org/b/c"
