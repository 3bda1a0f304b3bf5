"""Pictures in the chat page: pasted, dropped and chosen, answered, kept, and what a token of the answer looked at."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from bessemer.inference.engine import Engine, SamplingParams
from bessemer.inspection.recording import lens_logits, recording
from bessemer.model.layers.embedding import EmbeddedRows
from bessemer.model.vision.native import rope_positions
from bessemer.model.vision.pictures import read_picture
from bessemer.webapp.app import WebSettings, web_pages
from tests.model.picture_files import drawn, encoded, png_header, write_picture_model, write_qwen_model
from tests.serving.running import servers
from tests.webapp.test_accessibility import faults
from tests.webapp.test_chat import ANSWER, ask, opened

SMALL = encoded(drawn(40, 30))


@pytest.fixture(scope="module")
def seeing_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    write_picture_model(folder)
    return folder


@pytest.fixture(scope="module")
def seeing(seeing_folder):
    return Engine(seeing_folder, device="cpu")


@pytest.fixture(scope="module")
def url(seeing, seeing_folder):
    with servers() as start_server:
        yield start_server(seeing, web_pages(WebSettings(seeing_folder)))


def uri_of(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def data_of(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def give(page, kind: str, *files: tuple[str, str, bytes]) -> None:
    """Paste or drop files of a name, a type and content."""
    page.evaluate(
        """([kind, files]) => {
            const transfer = new DataTransfer();
            for (const [name, type, content] of files) {
                const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type }));
            }
            const more = { bubbles: true, cancelable: true };
            if (kind === "paste") {
                const pasted = new ClipboardEvent("paste", { clipboardData: transfer, ...more });
                // Firefox gives an event of a script's a clipboard of its own
                Object.defineProperty(pasted, "clipboardData", { value: transfer });
                document.getElementById("prompt").dispatchEvent(pasted);
            } else for (const name of ["dragover", "drop"]) {
                document.body.dispatchEvent(new DragEvent(name, { dataTransfer: transfer, ...more }));
            }
        }""",
        [kind, [(name, type, base64.b64encode(content).decode()) for name, type, content in files]],
    )


def waits_for(page, count: int) -> None:
    page.wait_for_function("count => document.querySelectorAll('#pictures img').length === count", arg=count)


def greedy(page, url: str) -> None:
    opened(page, url)
    page.evaluate("document.querySelector('[name=temperature]').value = 0")


def refused(page) -> None:
    """The requests that were refused on purpose are no fault of the page."""
    page.wrong[:] = [line for line in page.wrong if "400" not in line]


@pytest.mark.chromium("Playwright is not told there what a request sends")
def test_pictures_are_pasted_dropped_and_chosen_sent_answered_kept_and_taken_elsewhere(page, url, seeing):
    greedy(page, url)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "A camera of somebody's"  # turned by a quarter
    large = encoded(drawn(2400, 600, seed=2), "JPEG", exif=exif, quality=95)
    give(page, "paste", ("small.png", "image/png", SMALL))
    give(page, "drop", ("large.jpg", "image/jpeg", large), ("third.png", "image/png", encoded(drawn(20, 20, seed=3))))
    page.set_input_files(
        "#attach-files", {"name": "chosen.webp", "mimeType": "image/webp", "buffer": encoded(drawn(30, 30), "WEBP")}
    )
    waits_for(page, 4)
    page.get_by_label("Remove picture 3").click()
    page.get_by_label("Remove picture 3").click()
    waits_for(page, 2)
    assert page.get_by_label("Alt text of picture 2").input_value() == "large"
    page.get_by_label("Alt text of picture 1").fill("edges and gradients")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "what is in these?")
    page.wait_for_selector(ANSWER)
    (message,) = sent.value.post_data_json["messages"]
    first, second = (data_of(part["image_url"]["url"]) for part in message["content"][:2])
    assert message["content"][2] == {"type": "text", "text": "what is in these?"}
    # pixels of a small picture stay as they are; a large one is upright, smaller, and without what the camera wrote
    assert read_picture(first).digest == read_picture(SMALL).digest
    turned = read_picture(second)
    assert (
        (turned.width, turned.height) == (128, 512) and b"Exif" in large and b"Exif" not in second and b"somebody" not in second
    )
    content = [*({"type": "image", "image": one} for one in (first, second)), {"type": "text", "text": "what is in these?"}]
    answer = seeing.chat([{"role": "user", "content": content}], SamplingParams(temperature=0, max_tokens=12))
    assert not page.locator("#pictures img").count()
    used = int(page.inner_text("#context").split(" of ")[0])
    assert used == answer.prompt_tokens + len(answer.token_ids)

    page.reload()
    shown = page.locator("article.user .pictures img")
    shown.nth(1).wait_for()
    assert shown.nth(0).get_attribute("alt") == "edges and gradients" and data_of(shown.nth(1).get_attribute("src")) == second
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    kept = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    nodes = kept["conversations"][0]["nodes"].values()
    node, said = (next(one for one in nodes if one["role"] == role) for role in ("user", "assistant"))
    assert [data_of(one["data"]) for one in node["images"]] == [first, second] and said["content"] == answer.text
    # what is no picture is left out of a file, whoever wrote it
    node["images"].append({"data": "https://example.com/a.png", "alt": "elsewhere"})
    page.set_input_files(
        "#import-file", {"name": "a.json", "mimeType": "application/json", "buffer": json.dumps(kept).encode()}
    )
    page.wait_for_function("() => document.querySelectorAll('article.user .pictures img').length === 2")

    # a question is edited with its pictures, and an answer goes on behind its text
    greedy(page, page.url)
    page.click("article.user >> text=Edit")
    page.get_by_label("Remove picture 1").click()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector("article.user .place >> text=2 / 2")
    page.wait_for_selector(ANSWER)
    edited = sent.value.post_data_json["messages"]
    assert [part["type"] for part in edited[0]["content"]] == ["image_url", "text"]
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Continue").click()
    page.wait_for_selector(ANSWER)
    *before, begun = sent.value.post_data_json["messages"]
    assert before == edited and begun["role"] == "assistant" and sent.value.post_data_json["continue_final_message"]
    page.get_by_role("button", name="Tokens").click()
    page.wait_for_function("() => document.querySelectorAll('.tokens.pressable button').length > 12")
    page.wait_for_selector(".heat rect")


@torch.no_grad()
def direct(engine, prompt_ids, answer_ids, images):
    """The tokens as they are read, and the weights and states of a forward pass of the whole, by the model's modules."""
    reader = engine.pictures
    prepared = [reader.preprocessor.prepare(read_picture(one)) for one in images]
    expanded = reader.expand([*prompt_ids, *answer_ids], prepared)
    rows = torch.tensor([place for span in expanded.spans for place in span.places])
    vectors = torch.cat([reader.vectors(span.prepared) for span in expanded.spans])
    with recording(engine.model) as found:
        engine.model(torch.tensor([expanded.ids]), embedded=EmbeddedRows(rows, vectors))
    weights_LHS = torch.stack([torch.from_numpy(found.heads[layer].weights_BHTT[0, :, -1]) for layer in sorted(found.heads)])
    return expanded, weights_LHS, found


@torch.no_grad()
def test_a_picture_in_its_own_shape_is_shown_as_one_grid_of_its_attention(tmp_path):
    """Qwen2.5-VL's: weights of the model's modules, turned by positions of three numbers."""
    write_qwen_model(tmp_path)
    engine = Engine(tmp_path, device="cpu")
    reader, wide = engine.pictures, encoded(drawn(64, 40, seed=4))
    before = [9, reader.placeholder_id, 4, 30]
    body = {"model": "tiny", "before": before, "token": 7, "images": [uri_of(wide)]}
    with servers() as start_server:
        place = start_server(engine, web_pages(WebSettings(tmp_path))) + "/inspect/pictures"
        answer = httpx.post(place, json=body, timeout=60).json()
    ((tile,),) = [one["tiles"] for one in answer["pictures"]]
    assert (tile["token_rows"], tile["token_columns"], tile["box"]) == (5, 8, [0, 0, 1, 1])
    expanded = reader.expand(before, [reader.preprocessor.prepare(read_picture(wide))])
    (span,) = expanded.spans
    turns = list(rope_positions([span.grid], 0, len(expanded.ids)))
    with recording(engine.model) as found:
        engine.model(
            torch.tensor([expanded.ids]),
            embedded=EmbeddedRows(torch.tensor(span.places), reader.vectors(span.prepared)),
            rope_3BT=torch.tensor([turns]).permute(2, 0, 1),
        )
    weights_S = torch.stack([torch.from_numpy(one.weights_BHTT[0, :, -1]) for one in found.heads.values()]).mean((0, 1))
    assert tile["weights"] == pytest.approx(weights_S[list(span.places)].tolist(), abs=1e-5)
    assert max(tile["weights"]) > 1.5 * min(tile["weights"])


@pytest.mark.chromium("Playwright is not told there what a request sends")
def test_a_token_shows_where_it_looked_and_what_each_layer_says_behind_a_patch(page, url, seeing):
    greedy(page, url)
    give(page, "drop", ("small.png", "image/png", SMALL))
    waits_for(page, 1)
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "what is this?")
    page.wait_for_selector(ANSWER)
    # the same once more, whole
    said = httpx.post(url + "/v1/chat/completions", json={**sent.value.post_data_json, "stream": False, "stream_options": None})
    prompt, answer = said.json()["prompt_token_ids"], said.json()["choices"][0]["token_ids"]
    page.get_by_role("button", name="Tokens").click()
    page.click(".tokens.pressable button >> nth=3")
    page.wait_for_selector("#side[data-place='3']")
    expanded, weights_LHS, found = direct(seeing, prompt, answer[:3], [SMALL])
    (span,) = expanded.spans

    def shown():
        return {
            int(token): float(weight)
            for token, weight in page.evaluate(
                "[...document.querySelectorAll('.heat rect')].map((one) => [one.dataset.token, one.dataset.weight])"
            )
        }

    def same(weights_S):
        drawn_now = shown()
        assert drawn_now == pytest.approx({token: float(weights_S[token]) for token in drawn_now}, abs=1e-5)
        return list(drawn_now)

    # the tiles, then the whole picture: four tokens each
    tiles = same(weights_LHS.mean((0, 1)))
    page.get_by_role("button", name="the whole, made small").click()
    page.wait_for_function("() => document.querySelectorAll('.heat rect').length === 4")
    whole = same(weights_LHS.mean((0, 1)))
    assert sorted([*tiles, *whole]) == list(span.places) and whole == list(span.places[-4:])
    page.select_option("[aria-label='Attention by layer']", "1")
    page.wait_for_selector("#token-pictures[data-layer='1']")
    same(weights_LHS[1].mean(0))
    page.select_option("[aria-label='Attention by head']", "2")
    page.wait_for_selector("#token-pictures[data-head='2']")
    same(weights_LHS[1, 2])
    share = float(weights_LHS[1, 2, list(span.places)].sum())
    assert f"{100 * share:.0f}" in page.inner_text("#token-pictures p.soft")

    # a patch, by a press and by the keys
    page.locator(".heat rect").first.click()
    page.wait_for_selector(f".patch-lens[data-token='{whole[0]}']")
    page.locator(".heat").press("ArrowRight")
    page.wait_for_selector(f".patch-lens[data-token='{whole[1]}']")
    assert f"oken {whole[1]} of the prompt" in page.locator(".heat").get_attribute("aria-valuetext")
    with torch.no_grad():
        states = [lens_logits(seeing.model, residual[0, whole[1] : whole[1] + 1]).softmax(-1)[0] for residual in found.residual]
    ranks = [int((share_V > share_V[answer[3]]).sum()) + 1 for share_V in states]
    table = page.locator(".patch-lens tbody tr td:last-child").all_inner_texts()
    assert [int(text.replace(",", "")) for text in table] == ranks[::-1]
    # the prompt's tokens with those of each tile as one, which shows where they are
    page.get_by_role("button", name="Look", exact=True).click()
    page.locator(".looked-at .patches").first.click()
    page.wait_for_selector(f".patch-lens[data-token='{tiles[0]}']")
    assert page.locator(".looked-at .patches").count() == len(span.places) // 4

    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert faults(page) == []


def test_the_page_says_before_that_a_model_reads_no_pictures(page, start):
    page.set_viewport_size({"width": 400, "height": 800})
    opened(page, start())
    page.fill("#prompt", "what is this?")
    give(page, "paste", ("small.png", "image/png", SMALL))
    waits_for(page, 1)
    assert page.inner_text("#picture-warning") == "tiny reads no pictures: take them out, or choose a model that does."
    assert page.locator("#send").is_disabled()
    page.press("#prompt", "Enter")
    assert page.locator("article.user").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 400 and faults(page) == []
    page.get_by_label("Remove picture 1").click()
    assert page.locator("#picture-warning").is_hidden() and page.locator("#send").is_enabled()


def test_what_the_server_refuses_is_said_in_its_line(page, url):
    opened(page, url)
    cut_off, bomb = SMALL[:-300], png_header(60_000, 60_000)
    for name, data in (("cut.png", cut_off), ("bomb.png", bomb)):
        content = [{"type": "image_url", "image_url": {"url": uri_of(data)}}]
        line = httpx.post(
            url + "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": content}]}
        ).json()["error"]["message"]
        give(page, "drop", (name, "image/png", data))
        page.wait_for_function("line => document.getElementById('picture-note').textContent.endsWith(line)", arg=line)
        assert not page.locator("#pictures img").count()
    give(page, "drop", *((f"{number}.png", "image/png", encoded(drawn(8, 8))) for number in range(17)))
    waits_for(page, 17)
    ask(page, "how many?")
    page.wait_for_selector("article.assistant .failure >> text=has 17 pictures, at most 16 are read")
    # the refused question stays as a branch, and its pictures are not sent again
    ask(page, "and without?")
    page.wait_for_selector("article.user .place >> text=2 / 2")
    page.wait_for_selector(ANSWER)
    assert not page.locator("article.user .pictures").count()
    refused(page)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("pictures", {"head": 1}, "a head is of a layer"),
        ("pictures", {"layer": 9}, "the model has 2 layers of 4 heads"),
        ("pictures", {"images": ["https://example.com/a.png"]}, "fetches no addresses"),
        ("pictures", {"images": [uri_of(b"no picture")]}, "picture 1"),
        ("pictures", {"images": [uri_of(SMALL)] * 2}, "places for 1 pictures, and 2 are given"),
        ("patch", {"position": 400}, "none at 400"),
        ("token", {"images": []}, "the prompt has pictures, which are not read here"),
        ("change", {"images": ..., "layers": [0]}, "the prompt has pictures, which are not read here"),
    ],
)
def test_a_wrong_request_about_pictures_is_one_line(url, seeing, path, change, message):
    body = {"model": "tiny", "before": [9, seeing.pictures.image_token_id, 4], "token": 7, "images": [uri_of(SMALL)], **change}
    body = {name: value for name, value in body.items() if value is not ...}
    answer = httpx.post(f"{url}/inspect/{path}", json=body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_the_list_of_models_says_which_reads_pictures_and_how_large(url, start):
    seeing = httpx.get(url + "/v1/models").json()["data"][0]
    assert seeing["input_modalities"] == ["text", "image"] and seeing["image_size"] == {"longest_edge": 64}
    assert httpx.get(start() + "/v1/models").json()["data"][0]["input_modalities"] == ["text"]


def test_texts_are_looked_into_by_the_part_of_a_seeing_model_that_reads_them(url):
    assert httpx.post(url + "/inspect/xray", json={"text": "the end", "ablate": False}, timeout=60).status_code == 200
    told = httpx.post(url + "/inspect/change", json={"model": "tiny", "before": [9, 4, 30], "layers": [0]}, timeout=60)
    assert "error" not in told.text and '"changed"' in told.text
