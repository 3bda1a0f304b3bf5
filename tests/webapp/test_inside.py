"""A token's way through the model, and what becomes of a text when a part of it is changed: by the API and in a browser."""

from __future__ import annotations

import json
import math

import httpx
import pytest
import torch

from bessemer.inference.engine import Capture, Engine, EngineConfig, SamplingParams
from bessemer.inspection.forward_pass import LayerParts
from bessemer.inspection.interventions import Changes, continuation
from bessemer.inspection.recording import lens_logits
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.quantisation.quantised_layers import QuantisedWeight
from bessemer.model.storage.folder import load_model
from bessemer.webapp.app import WebSettings, web_pages
from bessemer.webapp.forward_api import percent, sentence_of_parts, sentence_of_softmax, sentence_of_step
from tests.serving.running import servers
from tests.webapp.test_accessibility import faults
from tests.webapp.test_chat import ANSWER, ask, opened

BEFORE, TOKEN = [9, 4, 30, 11, 30, 4], 7


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder)


def told(url, path, **body):
    """The events of a stream."""
    with httpx.stream("POST", f"{url}/inspect/{path}", json=body, timeout=60) as answer:
        lines = list(answer.iter_lines())
        assert answer.status_code == 200, lines
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def test_a_forward_pass_tells_the_steps_first_and_then_splits_every_layer(start, engine, model):
    url = start()
    first, *others = told(url, "forward", model="tiny", before=BEFORE, token=TOKEN)
    layers = [one for one in others if "layer" in one]
    progress = [one["progress"] for one in others]
    assert progress == sorted(progress) and progress[-1] == 1
    assert [step["name"] for step in first["steps"]] == ["embedding", *(f"layer {one['layer']}" for one in layers)]
    with torch.no_grad():
        logits_V = model(torch.tensor([BEFORE]))[0, -1]
    assert first["logit"] == pytest.approx(float(logits_V[TOKEN]), abs=1e-4)
    assert sum(step["part"] for step in first["steps"]) == pytest.approx(first["logit"], abs=1e-3)
    assert first["steps"][-1]["probability"] == pytest.approx(float(logits_V.softmax(-1)[TOKEN]), abs=1e-5)
    for step, one in zip(first["steps"][1:], layers, strict=True):
        assert one["attention"] + one["feed_forward"] == pytest.approx(step["part"], abs=1e-3)
        assert sum(one["heads"]) == pytest.approx(one["attention"], abs=1e-2)
        assert percent(step["probability"]) in step["sentence"] and str(one["strongest"]) in one["sentence"]
    asked = {"model": "tiny", "before": BEFORE, "token": TOKEN, "attention": {"layer": 1, "head": layers[1]["strongest"]}}
    attention = httpx.post(url + "/inspect/token", json=asked).json()["attention"]
    assert [look["weight"] for look in layers[1]["looks"]] == pytest.approx(sorted(attention, reverse=True)[:5], abs=1e-4)


def test_where_there_is_no_copy_the_steps_are_told_and_that_they_are_not_split(start):
    first, last = told(start(web={"makes_xrays": False}), "forward", model="tiny", before=BEFORE, token=TOKEN)
    assert first["steps"] and "asks for no key" in last["note"]


@pytest.fixture(scope="module")
def packed(model_folder, tmp_path_factory):
    """A GGUF file whose head the kernels have packed."""
    if library() is None:
        pytest.skip(str(unavailable()))
    path = tmp_path_factory.mktemp("packed") / "tiny.gguf"
    export_gguf(model_folder, path, "q8_0")
    with Engine(path, device="cpu", config=EngineConfig(cpu_kernels="on")) as engine, servers() as begin:
        yield engine, begin(engine, web_pages(WebSettings(path)))


def captured_states(engine):
    """States of the residual stream before the answer, (L, D), and what was sampled from: the likeliest tokens with theirs."""
    capture = Capture(states=tuple(range(engine.model.config.num_hidden_layers + 1)), positions="last")
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=20)
    (completion,) = engine.generate([BEFORE], params, capture=capture)
    (sampled,) = completion.log_probs
    return torch.cat([completion.captured.states[layer] for layer in capture.states]), dict(sampled.log_probs.top)


def test_the_packed_head_gives_the_numbers_that_were_sampled_and_reads_no_codes(packed, monkeypatch):
    engine, url = packed
    _, sampled = captured_states(engine)

    def dequantises(part):
        raise AssertionError(f"{part} reads its codes out")

    monkeypatch.setattr(QuantisedWeight, "stored", property(dequantises))
    found = httpx.post(url + "/inspect/token", json={"model": "tiny", "before": BEFORE, "token": TOKEN}).json()
    told = {one["id"]: math.log(one["probability"]) for one in found["alternatives"]}
    assert len(told) == 20 and told == pytest.approx(sampled, abs=1e-5)
    assert [row["likeliest"][0]["probability"] for row in found["lens"]][-1] == found["alternatives"][0]["probability"]


def test_the_packed_head_is_the_dequantised_one_but_for_rounded_activations(packed):
    engine, url = packed
    states_LD, _ = captured_states(engine)
    plain_LV = lens_logits(engine.model, states_LD.numpy())
    packed_LV = engine.lens_logits(states_LD)
    assert packed_LV.shape == plain_LV.shape and not torch.equal(packed_LV, plain_LV)
    assert (packed_LV - plain_LV).norm() < 0.01 * plain_LV.norm()
    first, *_ = told(url, "forward", model="tiny", before=BEFORE, token=TOKEN)
    assert first["rounding"] == pytest.approx(float(packed_LV[-1, TOKEN] - plain_LV[-1, TOKEN]), abs=1e-4)
    assert sum(step["part"] for step in first["steps"]) + first["rounding"] == pytest.approx(first["logit"], abs=1e-4)


def test_a_head_that_is_not_packed_is_multiplied_as_the_model_does(engine):
    states_LD, _ = captured_states(engine)
    assert torch.equal(engine.lens_logits(states_LD), lens_logits(engine.model, states_LD.numpy()))


def test_a_sentence_says_what_rounding_makes_of_the_logit():
    others = [{"id": 8, "piece": "t8", "probability": 1e-4}]
    said = sentence_of_softmax(" a", 5, 3.5, 0.5, 1000, others, -0.042)
    assert said == (
        "The logit of “ a” is 3.50 (rounding took 0.04 from it), which among 1,000 tokens is 50 %: "
        "5,000 times as likely as “t8”."
    )
    assert "rounding" not in sentence_of_softmax(" a", 5, 3.5, 0.5, 1000, others, 0.004)
    assert "3.0 times less likely than" in sentence_of_softmax(" a", 5, 3.5, 0.2, 1000, [{**others[0], "probability": 0.6}])


def test_a_sentence_says_what_a_step_did():
    def step(probability, best, rank=2):
        likeliest = [{"id": best, "piece": f"t{best}", "probability": 0.3}]
        return {"name": "layer 3", "part": 1.346, "probability": probability, "rank": rank, "likeliest": likeliest}

    said = sentence_of_step(" function", 5, step(0.21, 5), step(0.02, 8))
    assert said == "Layer 3 raised “ function” from 2.0 % to 21 %: it added 1.35 to the logit, and it now leads."
    assert "lowered “ function” from 21 % to 2.0 %" in sentence_of_step(" function", 5, step(0.02, 8), step(0.21, 5))
    assert "and “t8” now leads with 30 %" in sentence_of_step(" function", 5, step(0.02, 8), step(0.21, 5))
    assert "from place 90 to 7" in sentence_of_step(" function", 5, step(1e-6, 8, 7), step(1e-6, 8, 90))
    said = sentence_of_parts(LayerParts(3, -0.5, 0.2, [0.1, -0.6]), [{"piece": " def", "weight": 0.62}])
    assert said.endswith("of its heads, 1 took 0.60 from it while it looked at “ def” (62 %).")


def test_a_change_is_told_beside_the_unchanged_text(start, engine, model):
    url = start()
    edit = {"first": 2, "last": 3, "text": "the thin"}
    edited = [*BEFORE[:2], *engine.tokenizer.encode("the thin", add_bos=False), *BEFORE[4:]]
    for change, tokens, changes in (
        ({"heads": [{"layer": 1, "head": 2}]}, BEFORE, Changes(heads=[(1, 2)])),
        ({"layers": [0, 2]}, BEFORE, Changes(layers=[0, 2])),
        ({"edit": edit}, edited, None),
    ):
        events = told(url, "change", model="tiny", before=BEFORE, token=TOKEN, max_tokens=6, **change)
        by_side = {side: [one for one in events if one.get("side") == side] for side in ("whole", "changed")}
        for side, expected in (
            ("whole", continuation(model, BEFORE, 6, watched=TOKEN)),
            ("changed", continuation(model, tokens, 6, changes, watched=TOKEN)),
        ):
            wanted = list(expected)[: len(by_side[side])]
            assert [one["id"] for one in by_side[side]] == [one.id for one in wanted]
            assert by_side[side][0]["watched"] == pytest.approx(wanted[0].watched, abs=1e-5)
    patched, steered = (
        told(url, "change", before=BEFORE, max_tokens=3, whole=False, **change)
        for change in (
            {"patch": {"layer": 1, "edit": edit}},
            {"steer": {"layer": 1, "towards": ["the end"], "away": ["thin"], "strength": 4}},
        )
    )
    assert {one.get("side") for one in [*patched, *steered]} == {None, "changed"}
    assert patched[-1]["probability"] != steered[-1]["probability"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "name a change"),
        ({"layers": [99]}, "there is no layer 99"),
        ({"heads": [{"layer": 0, "head": 99}]}, "there is no head 99"),
        ({"edit": {"first": 4, "last": 3, "text": "a"}}, "an edit is of tokens 0 … 5"),
        ({"steer": {"layer": 0, "towards": [], "away": ["a"]}}, "towards"),
        ({"model": "other", "layers": [0]}, "no folder of its model"),
    ],
)
def test_a_wrong_change_is_one_line(start, change, message):
    answer = httpx.post(start() + "/inspect/change", json={"before": BEFORE, **change}, timeout=60)
    assert message in answer.text and answer.text.count('"error"') == 1
    assert answer.status_code in (200, 400, 404)


def test_heads_are_named_by_what_was_measured_of_them(start, model, engine):
    found = httpx.get(start() + "/inspect/heads", timeout=60).json()
    assert (found["layers"], found["heads"]) == (model.config.num_hidden_layers, model.config.num_attention_heads)
    assert all(one["score"] >= 0.4 and one["layer"] < found["layers"] for one in found["names"])


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def token_page(page, start):
    """A page with a token open."""
    page.emulate_media(reduced_motion="reduce")
    opened(page, start())
    ask(page, "the end")
    page.wait_for_selector(ANSWER)
    page.get_by_role("button", name="Tokens").click()
    page.wait_for_selector("#token-lens table")
    return page


def test_a_tokens_way_is_gone_step_by_step_to_the_draw(token_page):
    page = token_page
    page.click("text=Follow its way")
    page.wait_for_selector(".forward[data-whole]")
    steps = page.locator(".parts li").count()
    assert "embedding alone" in page.inner_text(".sentence")
    page.get_by_label("Next step").click()
    assert page.get_attribute("div.forward", "data-step") == "layer 0" and page.inner_text(".controls output") == f"2 / {steps}"
    sentence = page.inner_text(".sentence")
    assert (
        "feed-forward" in sentence and "\u00a0%" in sentence and " %" not in sentence and page.locator(".split li").count() > 2
    )
    page.get_by_label("Step", exact=True).press("End")
    assert page.get_attribute("div.forward", "data-step") == "draw"
    window = page.get_by_role("dialog")
    window.get_by_role("slider", name="Top k").fill("1")
    page.wait_for_selector(".sentence >> text=one token may be drawn")
    window.get_by_role("slider", name="Temperature").fill("1")
    window.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_selector(".sentence >> text=/The number 0.\\d+ draws/")
    assert faults(page) == []
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog.forward", state="detached")
    # Esc was for the window alone
    assert page.locator("#side").is_visible()


def test_steps_play_by_themselves_and_stop(token_page):
    page = token_page
    page.clock.install()
    page.click("text=Follow its way")
    page.wait_for_selector(".parts li")
    page.get_by_role("button", name="Play").click()
    page.clock.run_for(2300)
    page.get_by_role("button", name="Pause").click()
    # the page's own time goes on beside the clock's, so a busy machine has come further
    reached = page.inner_text(".controls output")
    assert int(reached.split(" /")[0]) >= 3
    page.clock.run_for(1500)
    assert page.inner_text(".controls output") == reached


def test_a_change_is_seen_beside_the_text_as_it_is(token_page):
    page = token_page
    page.set_viewport_size({"width": 400, "height": 800})
    page.click("text=Change it and see")
    page.wait_for_selector(".changing form")
    fonts = "['body', '.changing label'].map((one) => getComputedStyle(document.querySelector(one)).fontFamily)"
    assert len(set(page.evaluate(fonts))) == 1
    page.click("text=Go on with it")
    page.wait_for_selector(".results[data-done]")
    whole = page.inner_text(".results .answered >> nth=0")
    page.select_option("[name=kind]", "edit")
    page.fill("[name=text]", "thin")
    page.click("text=Go on with it")
    page.wait_for_selector(".results[data-done] >> text=With “thin” for")
    assert page.inner_text(".results .answered >> nth=0") == whole
    differ = page.locator(".results mark").count()
    assert differ and "tokens differ" in page.inner_text(".results")
    page.select_option("[name=kind]", "steer")
    page.click("text=Go on with it")
    page.wait_for_selector(".results[data-done] >> text=Steered behind layer")
    assert page.evaluate("document.querySelector('dialog').scrollWidth") <= 400
    table = (
        "(() => { const table = document.querySelector('.results .scroll'); return table.scrollWidth <= table.clientWidth; })()"
    )
    assert page.evaluate(table), "the table of what follows is cut"
    assert faults(page) == []


def test_what_two_texts_share_is_their_longest_common_subsequence(page, start):
    url = start()
    page.goto(url)
    kept = page.evaluate(f"import('{url}/static/change.js').then((change) => change.common([1, 2, 3, 4], [2, 9, 4, 4]))")
    assert kept == [[False, True, False, True], [True, False, True, False]]
