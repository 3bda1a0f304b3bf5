"""`bessemer inspect` and what it stands on: one value with all numbers, its page, its command."""

import html
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from rich.console import Console

from bessemer.core.errors import RequestError
from bessemer.inspection.inspect import find_token, inspect, tokenized
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import save_model
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.views.inspection import inspection_page
from bessemer.views.inspection_terminal import show_inspection
from tests.cli.test_main import bessemer, one_error
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

HOSTILE = "</style><script>alert(1)</script> the é\x1b[2J thin"
SHAPES = {
    "dense": {},
    "experts and sinks": {"num_experts": 4, "attention_sinks": True, "attn_logit_softcapping": 5.0},
    "hybrid": {"layer_types": ("linear_attention", "full_attention"), "attention_output_gate": True},
    "linear": {"layer_types": ("linear_attention",) * 2},
    "latent": {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_small_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def small(**changes):
    config = ModelConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, head_dim=8, intermediate_size=32, **changes
    )
    return initial_decoder(config, seed=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_page_of_any_kind_of_model_is_whole_and_holds_its_text_as_text(shape, tokenizer):
    model = small(**SHAPES[shape])
    found = inspect(model, tokenizer, HOSTILE, neighbours_of=["the"], analogies=["a - the + x"])
    page = inspection_page(found, "<model>")
    opened = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "img", "input"):
                opened.append(tag)

        def handle_startendtag(self, tag, attributes):
            pass

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Tags().feed(page)
    assert not opened
    assert "<script" not in page and "http:" not in page and "https:" not in page
    # once closed, a style of ours ends: none of the text's
    assert page.count("</style>") == page.count("<style>")
    assert html.unescape(re.search(r"<h1[^>]*>(.*?)</h1>", page, re.DOTALL)[1]) == HOSTILE
    pictures = set(re.findall(r"--(h\d-\d):url\(data:image/png;base64,[\w+/=]+\)", page))
    weighed = [layer for layer, kind in enumerate(model.config.types) if kind != "linear_attention"]
    assert pictures == {f"h{layer}-{head}" for layer in weighed for head in range(4)}
    assert ("linear attention: a state" in page) == (len(weighed) < 2)
    assert ('id="experts"' in page) == bool(found.experts)
    assert inspection_page(found, "<model>") == page
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(show_inspection(found))
    assert "\x1b[2J" not in console.export_text()


def test_the_head_that_looks_hardest_from_query_at_key_is_opened(tokenizer):
    model = small()
    found = inspect(model, tokenizer, "in a the x", query="x", key="the")
    assert (found.opened.position, found.key) == (6, 4)
    looks_LH = np.stack([weights[:, 6, 4] for weights in found.attention])
    assert (found.towards(6, 4) == looks_LH).all()
    assert (found.opened.layer, found.opened.head) == np.unravel_index(looks_LH.argmax(), looks_LH.shape)
    asked = inspect(model, tokenizer, "in a the x", layer=1, head=2, query=2, ablate=False)
    assert (asked.opened.layer, asked.opened.head, asked.opened.position) == (1, 2, 2)
    assert asked.head_changes_LH is None


def test_tokens_stand_where_their_characters_are(tokenizer):
    text = "in a thé x"
    tokens = tokenized(tokenizer, text)
    assert tokens.ids.tolist() == tokenizer.encode(text)
    assert tokens.offsets[0].tolist() == [0, 0]  # the begin token
    shown = [text[start:end] for start, end in tokens.offsets]
    assert shown == ["", "in", " a", " ", "th", "é", "é", " ", "x"]
    assert tokens.pieces[0] == "<|endoftext|>" and tokens.pieces[4] == "th"
    assert find_token(tokens, "a") == 2 and find_token(tokens, "-1") == 8
    for asked, message in (
        ("th ink", "no token of the text is 'th ink'"),
        ("9", "there is no position 9: the text has 9"),
        (" ", "' ' stands at positions 3, 7: name the position"),
    ):
        with pytest.raises(RequestError, match=message):
            find_token(tokens, asked)


def test_arrays_hold_what_the_model_computed(tokenizer):
    model = small(num_experts=4)
    found = inspect(model, tokenizer, "in the")
    arrays = found.arrays()
    with torch.no_grad():
        probabilities = model(torch.from_numpy(found.tokens.ids)[None])[0].softmax(-1).numpy()
    assert np.allclose(arrays["lens_probabilities_LTk"][-1], -np.sort(-probabilities)[:, :5])
    assert arrays["attention_1"].shape == (4, len(found.tokens.ids), len(found.tokens.ids))
    assert arrays["experts_0"].shape == (len(found.tokens.ids), 2)
    assert found.loss == pytest.approx(
        -np.log(probabilities[np.arange(len(arrays["tokens"]) - 1), arrays["tokens"][1:]]).mean()
    )


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    save_model(small(), folder, tokenizer=tokenizer.folder)
    return folder


def test_command_writes_page_picture_and_arrays(capsys, folder, tmp_path):
    page, picture, arrays = (tmp_path / name for name in ("page.html", "head.png", "numbers.npz"))
    code, out, _ = bessemer(
        capsys, "inspect", folder, "in a the x", "--query", "x", "--key", "the",
        "--neighbours", "the", "--analogy", "a - the + x", "--out", page, "--picture", picture, "--arrays", arrays,
    )  # fmt: skip
    assert code == 0
    assert "Which heads of x look at the" in out and "Nearest to a - the + x" in out and f"written: {page}" in out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>") and picture.read_bytes().startswith(b"\x89PNG")
    with np.load(arrays) as numbers:
        assert numbers["nearest the"].shape == (10,) and numbers["head_weights_T"].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in", "--layer", "2"], "there is no layer 2: the model has 2, counted from 0"),
        (["in", "--layer", "0", "--head", "4"], "there is no head 4: layer 0 has 4, counted from 0"),
        (["in", "--head", "1"], "a head is asked for without its layer; give both"),
        (["in", "--key", "the"], "no token of the text is 'the'"),
        (["in", "--neighbours", "thee"], "'thee' is not one token but 2: 'the' 'e'"),
        (["in", "--analogy", "a+b"], "an analogy is written \"king - man + woman\", got 'a+b'"),
        (["x" * 600], "the text has 601 tokens, and pictures are drawn of at most 512"),
        (["in", "--picture", "head.gif"], "a picture ends in one of .png, .svg, .pdf"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(capsys, folder, arguments, message):
    code, _, err = bessemer(capsys, "inspect", folder, *arguments)
    assert code == 2
    assert message in one_error(err)


def test_page_of_a_long_text_shows_the_last_predictions_and_the_largest_weights(tokenizer):
    found = inspect(small(), tokenizer, "x" * 200, ablate=False)
    page = inspection_page(found, "small")
    assert "Of 201 positions the last 64 are shown." in page
    assert "The 64 keys with the largest weights are shown, 137 are left out." in page
    assert len(re.search(r'class="lens.*?<tbody>(.*?)</tr>', page, re.DOTALL)[1].split("<td")) - 2 == 64
