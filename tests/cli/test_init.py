"""A folder of one's own text: what `bessemer init` writes."""

import re

import pytest

from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import save_model
from bessemer.pipeline.api import prepare
from bessemer.pipeline.own_text import OwnText, find_text
from bessemer.pipeline.recipe import load_recipe
from tests.cli.test_main import bessemer, one_error
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer
from tests.tokenization.conftest import synthetic_corpus


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder with three texts and a file that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    pieces = synthetic_corpus(180)
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text("\n\n".join(pieces[number::3]), encoding="utf-8")
    (tmp_path / "texts" / "notes.docx").write_bytes(b"0" * 9999)
    return tmp_path / "texts"


def made(capsys, monkeypatch, tmp_path, *arguments):
    """The recipe of a new folder, which is the current one from now on, and what was said."""
    code, out, err = bessemer(capsys, "init", tmp_path / "mine", *arguments)
    assert code == 0, err
    monkeypatch.chdir(tmp_path / "mine")
    return load_recipe("recipe.yaml"), out


def test_the_corpus_is_one_s_own_text_alone(capsys, monkeypatch, tmp_path, texts):
    recipe, out = made(capsys, monkeypatch, tmp_path, "--text", "texts")
    assert [(one.source, one.paths) for one in recipe.stage("collect").config.sources] == [("files", ["../texts"])]
    assert re.search(r"a recipe for about \d\d\.\d kB of text", out)
    assert len(prepare("recipe.yaml").plan()) == len(recipe.stages)


def test_a_place_for_text_that_holds_none_yet_is_named(capsys, monkeypatch, tmp_path):
    _, out = made(capsys, monkeypatch, tmp_path)
    assert f"put your text (.txt, .md, .jsonl) into {tmp_path / 'mine' / 'data'}" in out
    code, _, err = bessemer(capsys, "run", "recipe.yaml")
    assert code == 2 and "data" in one_error(err)


def test_a_name_that_yaml_reads_as_a_number_stays_a_name(capsys, monkeypatch, tmp_path):
    assert bessemer(capsys, "init", tmp_path / "2026")[0] == 0
    assert load_recipe(str(tmp_path / "2026" / "recipe.yaml")).name == "2026"


@pytest.mark.parametrize(
    ("size", "entries"), [(None, 1024), (100_000, 512), (1_100_000, 1024), (5_000_000, 2048), (50_000_000, 4096)]
)
def test_the_vocabulary_fits_the_amount_of_text(size, entries):
    assert OwnText(size=size).vocab_size() == entries


def test_kinds_of_files_are_read_by_their_sources(tmp_path):
    for name in ("a.txt", "b.md.gz", "c.html", "d.pdf", "e.csv"):
        (tmp_path / name).write_bytes(b"0" * 1000)
    found = find_text([tmp_path], tmp_path)
    assert found.paths == {"files": ["."], "html": ["."], "pdf": ["."]} and found.size == 1000 + 3000 + 100 + 100


def test_too_little_text_is_said_with_what_to_do_instead(capsys, monkeypatch, tmp_path, texts):
    assert "bessemer init FOLDER --from smollm2 --text PATH" in made(capsys, monkeypatch, tmp_path, "--text", "texts")[1]


@pytest.mark.parametrize(("place", "expected"), [("nowhere", "there is no such file or folder"), ("empty", "no text is found")])
def test_text_that_is_not_there_is_one_line_and_nothing_is_made(capsys, monkeypatch, tmp_path, place, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, _, err = bessemer(capsys, "init", "mine", "--text", place)
    assert code == 2 and expected in one_error(err)
    assert not (tmp_path / "mine").exists()


@pytest.fixture
def base(tmp_path):
    """A model of somebody else."""
    shape = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        max_position_embeddings=256,
    )
    save_model(Decoder(shape), tmp_path / "base", tokenizer=write_small_tokenizer(tmp_path / "tokenizer"))
    return tmp_path / "base"


def test_an_open_model_goes_on_with_its_own_vocabulary(capsys, monkeypatch, tmp_path, texts, base):
    recipe, out = made(capsys, monkeypatch, tmp_path, "--text", "texts", "--from", "base")
    assert recipe.stage("tokenize").config.tokenizer == recipe.stage("model").config.init_from == "../base"
    assert recipe.stage("evaluate").config.models == ["model", "pretrain"]
    assert len(prepare("recipe.yaml").plan()) == len(recipe.stages)
    assert "import" not in out and "--from" not in out


def test_a_model_that_is_to_be_imported_first_is_said(capsys, monkeypatch, tmp_path, texts):
    recipe, out = made(capsys, monkeypatch, tmp_path, "--text", "texts", "--from", "smollm2")
    assert "  bessemer import smollm2 base\n" in out and recipe.stage("model").config.init_from == "base"


def test_a_file_to_go_on_with_is_named_from_the_new_folder(capsys, monkeypatch, tmp_path, texts):
    (tmp_path / "my model.gguf").touch()
    _, out = made(capsys, monkeypatch, tmp_path, "--text", "texts", "--from", "my model.gguf")
    assert "  bessemer import '../my model.gguf' base\n" in out


SHORT = ["pretrain.compile=false", "pretrain.batch_size=4", "pretrain.context_length=64"]


@pytest.mark.slow
def test_the_end_of_a_run_says_bits_per_byte_and_goes_on_with_held_out_text(capsys, monkeypatch, tmp_path, texts):
    made(capsys, monkeypatch, tmp_path, "--text", "texts")
    code, out, err = bessemer(capsys, "run", "recipe.yaml", "pretrain.steps=3", "model.num_hidden_layers=1", *SHORT)
    assert code == 0, err
    assert "run mine, in runs/mine" in out + err
    assert "Bits per byte on text held out of training" in out and "begins at ▸" in out
    assert "too little to learn a language from" in out
    page = (tmp_path / "mine" / "runs" / "mine" / "report.html").read_text(encoding="utf-8")
    assert "begins at ▸" in page


@pytest.mark.slow
def test_an_open_model_is_better_at_one_s_text_afterwards(capsys, monkeypatch, tmp_path, texts, base):
    made(capsys, monkeypatch, tmp_path, "--text", "texts", "--from", "base")
    code, out, err = bessemer(capsys, "run", "recipe.yaml", "pretrain.steps=20", "pretrain.learning_rate=1e-2", *SHORT)
    assert code == 0, err
    before, after = (
        float(found.partition(" ")[0].strip(",")) for found in out.split("better: model ")[1].split("pretrain ")[:2]
    )
    assert after < before
