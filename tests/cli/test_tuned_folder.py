"""What `bessemer finetune` wrote, as a model of every command."""

from __future__ import annotations

import io
import shutil

import pytest
import torch

from bessemer.core.store import read_json, write_json
from bessemer.inference.build import open_model
from bessemer.inference.config import EngineConfig
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.model.adapters.folder import read_adapter, write_adapter
from bessemer.model.adapters.trained import merged
from bessemer.model.storage.folder import load_model, save_model
from bessemer.model.storage.tuned_folder import place_of_base
from bessemer.serving import server
from bessemer.serving.runtime.models import size_of
from tests.cli.test_main import bessemer, one_error
from tests.model.random_adapters import random_adapter
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
LOSSES = {"a": [3.0, 2.0], "b": [3.1, 2.2], "c": [2.9, 1.9]}
RESULT = {
    "data": "conversations learnt: 9",
    "verdict": "better than before on what was held out: yes, much better. Loss 3.000 → 2.033 nats a token",
    "answers": [{"prompt": "Where?", "reference": "Here.", "before": "What?", "after": "Here."}],
    "method": "lora",
    "loss_before": 3.0,
    "loss_after": 2.033,
    "losses": LOSSES,
    "tokenizer": "one",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and a fine-tuning's folder, whose adapter says something else."""
    folder = tmp_path_factory.mktemp("tuned")
    tokenizer = write_small_tokenizer(folder / "tokenizer")
    save_model(random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)), folder / "base", tokenizer=tokenizer)
    model = load_model(folder / "base")
    write_adapter(random_adapter(model), model, folder / "out" / "adapter")
    record = {"asked": {}, "method": "lora", "base": place_of_base(folder / "base", folder / "out"), "result": RESULT}
    write_json(folder / "out" / "finetune.json", record)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """The same, to be changed, as the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "out"):
        shutil.copytree(made / name, tmp_path / name)
    record = read_json(tmp_path / "out" / "finetune.json")
    write_json(tmp_path / "out" / "finetune.json", record | {"base": place_of_base(tmp_path / "base", tmp_path / "out")})
    return tmp_path


@pytest.fixture(scope="module")
def answers(made):
    """What the base says, and what it says with the adapter."""
    engine = Engine(made / "base")
    engine.load_adapter("bent", made / "out" / "adapter")
    plain, bent = (engine.generate(["the thin"], GREEDY, adapter=name)[0].text for name in (None, "bent"))
    assert plain != bent
    return plain, bent


def test_the_engine_answers_as_tuned_and_the_adapter_has_no_name(made, answers):
    with Engine(made / "out") as engine:
        assert engine.generate(["the thin"], GREEDY)[0].text == answers[1]
        assert engine.adapters == ()


@pytest.mark.parametrize(("dtype", "is_merged"), [(torch.float32, True), (torch.bfloat16, False)], ids=["float32", "bfloat16"])
def test_an_adapter_is_merged_into_exact_weights_and_stays_beside_rounded_ones(place, dtype, is_merged):
    base = load_model(place / "base", dtype=dtype)
    (place / "base").rename(place / "before")
    save_model(base, place / "base", tokenizer=place / "before")
    opened = open_model(place / "out", None, "cpu", EngineConfig())
    weight = next(iter(read_adapter(place / "out" / "adapter", base).updates)) + ".weight"
    assert (opened.adapter is None) is is_merged
    assert torch.equal(opened.model.get_parameter(weight), base.get_parameter(weight).to(opened.model.dtype)) is not is_merged


def test_another_adapter_takes_the_place_of_the_one_that_was_tuned(made, answers, tmp_path):
    base = load_model(made / "base")
    write_adapter(random_adapter(base, seed=9), base, tmp_path / "other")
    said = []
    for model in (made / "base", made / "out"):
        with Engine(model, adapter=tmp_path / "other") as engine:
            said.append(engine.generate(["the thin"], GREEDY)[0].text)
    assert said[0] == said[1] not in answers


def test_generate_and_chat_use_the_adapter(made, answers, capsys, monkeypatch):
    code, out, _ = bessemer(capsys, "generate", made / "out", "the thin", "--max-tokens", 12)
    assert (code, out) == (0, f"{answers[1]}\n")
    said = []
    for model in (made / "base", made / "out"):
        monkeypatch.setattr("sys.stdin", io.StringIO("the thin\n"))
        code, out, _ = bessemer(capsys, "chat", model, "--max-tokens", 12)
        said.append(out)
    assert code == 0 and said[0] != said[1]


def test_serve_s_model_is_the_tuned_one_under_the_folder_s_name(made, answers, capsys, monkeypatch):
    served = []

    def serve(engine, name, config, pages, **options):
        served.append((name, engine.adapters, engine.generate(["the thin"], GREEDY)[0].text))

    monkeypatch.setattr(server, "serve", serve)
    code, _, _ = bessemer(capsys, "serve", made / "out")
    assert (code, served) == (0, [("out", (), answers[1])])


def test_evaluate_takes_the_adapter_by_the_folder_or_by_its_option(place, capsys):
    asked = ("--tasks", "arithmetic", "--limit", 2, "--out")
    for name, model in (("tuned", ("out",)), ("option", ("base", "--adapter", "out/adapter")), ("plain", ("base",))):
        code, _, err = bessemer(capsys, "evaluate", *model, *asked, name)
        assert code == 0, err
    items = {name: (place / name / "items.jsonl").read_text(encoding="utf-8") for name in ("tuned", "option", "plain")}
    assert items["tuned"] == items["option"] != items["plain"]
    models = {name: read_json(place / name / "results.json")["model"] for name in items}
    assert models["tuned"]["weights"] == models["option"]["weights"] != models["plain"]["weights"]
    assert [models[name]["name"] for name in items] == ["out", "base-adapter", "base"]


def test_what_needs_one_set_of_weights_merges_them_once(place, capsys):
    code, out, err = bessemer(capsys, "export", "out", "out.gguf")
    assert code == 0 and "out: merging the adapter into its base, once" in err and "out.gguf: written" in out
    base = load_model(place / "base")
    whole = merged(base, read_adapter(place / "out" / "adapter", base))
    written = load_model(place / "out" / "model")
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in written.state_dict().items())
    for command in (("quantize", "out", "small"), ("inspect", "out", "the thin", "--no-ablate"), ("show", "out")):
        code, _, err = bessemer(capsys, *command)
        assert (code, "merging" in err) == (0, False), command
    assert (place / "small" / "config.json").exists()


def test_a_file_s_name_tells_the_format_or_the_option_must(place, capsys):
    code, _, err = bessemer(capsys, "export", "base", "base.bin")
    assert code == 2 and "--format: base.bin does not tell it by its name" in one_error(err)


def test_merge_writes_the_model_in_its_own_folder_or_in_another(place, capsys):
    for command in (("out", "whole"), ("base", "beside", "--adapter", "out/adapter"), ("out",)):
        code, printed, err = bessemer(capsys, "merge", *command)
        assert code == 0 and "merged into it" in printed, err
    weights = [(place / name / "model.safetensors").read_bytes() for name in ("whole", "beside", "out/model")]
    assert weights[0] == weights[1] == weights[2] != (place / "base" / "model.safetensors").read_bytes()
    code, _, _ = bessemer(capsys, "merge", "out", "half", "--dtype", "bf16")
    assert code == 0 and load_model(place / "half").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base",), "name the folder to make"),
        (("base", "whole"), "base is not what finetune wrote; name its adapter with --adapter"),
        (("out", "whole", "--dtype", "f8"), "--dtype: there is no 'f8'"),
        (("out", "base"), "base: exists already and is not empty"),
    ],
)
def test_what_cannot_be_merged_is_one_line(place, capsys, arguments, message):
    code, _, err = bessemer(capsys, "merge", *arguments)
    assert code == 2 and message in one_error(err)


def test_there_is_nothing_to_merge_where_all_weights_were_tuned(place, capsys):
    (place / "base").rename(place / "out" / "model")
    shutil.rmtree(place / "out" / "adapter")
    for arguments in (("out",), ("out", "whole")):
        code, _, err = bessemer(capsys, "merge", *arguments)
        assert code == 2 and "all weights were tuned" in one_error(err)


def test_what_was_tuned_takes_the_memory_of_its_base_and_its_adapter(place):
    adapter = (place / "out" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size_of(place / "out") == size_of(place / "base") + adapter


def test_a_folder_that_is_moved_with_its_base_stays_a_model(place, answers, capsys):
    (place / "elsewhere").mkdir()
    for name in ("base", "out"):
        (place / name).rename(place / "elsewhere" / name)
    code, out, _ = bessemer(capsys, "generate", "elsewhere/out", "the thin", "--max-tokens", 12)
    assert (code, out) == (0, f"{answers[1]}\n")


def gone(place):
    (place / "base").rename(place / "other")


def changed(place):
    shutil.rmtree(place / "base")
    other = random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE, tie_word_embeddings=False), seed=9)
    save_model(other, place / "base", tokenizer=place / "out")


def unfinished(place):
    record = read_json(place / "out" / "finetune.json")
    write_json(place / "out" / "finetune.json", {name: value for name, value in record.items() if name != "result"})


@pytest.mark.parametrize("command", ["generate", "inspect"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gone, "which is not there any more; put it back, or say where it is now: bessemer merge MODEL NEW_FOLDER --adapter"),
        (changed, "was trained on a model with other weights; use it with that one, as it was then"),
        (unfinished, "out: this fine-tuning has not ended; the same `bessemer finetune` goes on with it"),
    ],
)
def test_a_base_that_is_gone_or_changed_is_one_line(place, capsys, command, change, message):
    if change is changed:
        shutil.copy(place / "base" / "tokenizer.json", place / "out")
        shutil.copy(place / "base" / "tokenizer_config.json", place / "out")
    change(place)
    code, _, err = bessemer(capsys, command, "out", "the thin")
    assert code == 2
    error = [line for line in err.splitlines() if "merging the adapter" not in line]
    assert message in one_error("\n".join(error))


def test_an_adapter_alone_is_no_model_and_the_folder_that_joins_it_is_named(place, capsys):
    code, _, err = bessemer(capsys, "chat", "out/adapter")
    assert code == 2 and "out/adapter: an adapter and no model" in one_error(err) and "name out, which is its model" in err


def test_compare_tells_a_fine_tuning_from_its_base_and_from_another(place, capsys):
    code, out, _ = bessemer(capsys, "compare", "out")
    assert code == 0 and "before: What?" in out and "after: Here." in out and RESULT["verdict"] in out
    other = shutil.copytree(place / "out", place / "other")
    record = read_json(other / "finetune.json")
    better = {"losses": {id: [before, after - 1] for id, (before, after) in LOSSES.items()}}
    write_json(other / "finetune.json", record | {"result": RESULT | better})
    code, out, _ = bessemer(capsys, "compare", "out", "other")
    assert code == 0 and "other better than out on what was held out: yes, much better. Loss 2.033 → 1.033" in out
    write_json(other / "finetune.json", record | {"result": RESULT | {"tokenizer": "two"}})
    _, _, err = bessemer(capsys, "compare", "out", "other")
    assert "have different tokenizers" in one_error(err)


def test_show_tells_what_was_tuned_and_what_it_was_worth(place, capsys):
    code, out, _ = bessemer(capsys, "show", "out")
    assert code == 0
    for words in ("lora", "before: What?", "much better", "Adapter"):
        assert words in out.replace("\n", ""), words
