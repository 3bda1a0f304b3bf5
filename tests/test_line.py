"""The whole line on a small scale: every stage once, from text files to a server that OpenAI's client talks with."""

import ast
import inspect
import json
import threading
from importlib import import_module
from pathlib import Path

import pytest
import torch

import bessemer
from bessemer.cli.main import main
from bessemer.core.store import follow
from bessemer.tokenization.shards import TokenShards
from bessemer.training.validation import bits_per_byte

MODULES = (
    "argparse", "ast", "asyncio.events", "calendar", "codecs", "collections", "configparser", "csv", "datetime", "decimal",
    "difflib", "email.message", "fractions", "functools", "heapq", "http.client", "inspect", "logging", "mailbox", "optparse",
    "pathlib", "pickle", "random", "shutil", "socket", "statistics", "subprocess", "tarfile", "textwrap", "threading",
    "typing", "unittest.case", "urllib.request", "xml.dom.minidom", "zipfile",
)  # fmt: skip

RECIPE = """
format: 1
name: small
seed: 7
collect:
  - {source: files, paths: documents.jsonl}
clean: {score: [language, gopher_quality]}
deduplicate: [exact]
select: {keep: gopher_quality, thresholds: {gopher_words: {min: 12}, gopher_words_with_letter: {min: 0.5}}}
tokenize: {vocab_size: 512}
model: {preset: qwen3-1m, num_hidden_layers: 2, hidden_size: 64, intermediate_size: 128}
pretrain: {steps: 12, batch_size: 4, context_length: 64, dtype: float32, compile: false, evaluate_tokens: 2048}
sft: {data: [questions.jsonl], steps: 6, batch_size: 4, context_length: 64, dtype: float32, compile: false}
evaluate: {questions: 4, max_new_tokens: 8}
quantize: {scheme: int8, quality_tokens: 2000, price_per_hour: 0.1}
"""


def documents() -> list[dict]:
    """The docstrings of a few modules of the standard library, without importing what runs code of its own."""
    found = []
    for name in MODULES:
        tree = ast.parse(Path(inspect.getsourcefile(import_module(name))).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and (text := ast.get_docstring(node)):
                found.append({"id": f"{name}:{getattr(node, 'lineno', 0)}", "text": text})
    return found


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A folder in which the recipe has run once."""
    folder = tmp_path_factory.mktemp("line")
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as stream:
        for document in documents():
            stream.write(json.dumps(document) + "\n")
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as stream:
        for index in range(24):
            turns = [("user", f"What is {index} plus one?"), ("assistant", str(index + 1))]
            stream.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        bessemer.run("recipe.yaml")
    return folder


def command(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    captured = capsys.readouterr()
    assert not stop.value.code, captured.err
    return captured.out


def test_every_stage_is_linked_and_the_manifests_verify(line):
    from bessemer.core.store import Artefact

    stages = sorted(path.name for path in (line / "runs/small/stages").iterdir())
    assert stages == sorted(
        ["collect", "clean", "deduplicate", "select", "tokenize", "model", "pretrain", "sft", "evaluate", "quantize"]
    )
    for stage in stages:
        folder = follow(line / "runs/small/stages" / stage)
        Artefact(folder.name, folder).verify()


def test_the_final_model_is_quantised_beside_itself_and_the_report_says_what_that_costs(line):
    folder = follow(line / "runs/small/quantised")
    quality = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    assert quality["quantised"]["bytes"] < 0.5 * quality["original"]["bytes"]
    assert abs(quality["loss"]) < 0.01 and quality["price_per_hour"] == 0.1
    for name in ("original", "quantised"):
        speed, cost = (quality[name][key] for key in ("tokens_per_second", "cost_per_million_tokens"))
        assert speed > 0 and cost == pytest.approx(0.1 / 3600 / speed * 1e6)
    completion = bessemer.Engine(folder).generate(["Return the"], bessemer.SamplingParams(max_tokens=4, temperature=0.0))
    assert completion[0].token_ids
    assert f"{quality['quantised']['bits_per_byte']:.4f}" in (line / "runs/small/report.html").read_text(encoding="utf-8")


def test_a_second_run_reuses_everything(line, capsys, monkeypatch):
    monkeypatch.chdir(line)
    report = (line / "runs/small/report.html").read_text(encoding="utf-8")
    assert "10 of 10 stages reused" in command(capsys, "run", "recipe.yaml")
    assert (line / "runs/small/report.html").read_text(encoding="utf-8") == report  # what the stages took when they were made


def test_the_final_model_opens_in_transformers_with_equal_logits_and_text(line):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = follow(line / "runs/small/model")
    ours = bessemer.load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, their_tokenizer = bessemer.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "Return the number of the first item that is not in the list."
    assert tokenizer.encode(text) == their_tokenizer(text)["input_ids"]
    tokens = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    expected = theirs.generate(tokens, max_new_tokens=24, do_sample=False, eos_token_id=list(tokenizer.eos_ids))
    completion = bessemer.Engine(folder).generate([text], bessemer.SamplingParams(max_tokens=24, temperature=0.0))[0]
    generated = expected[0, tokens.shape[1] :].tolist()
    assert completion.token_ids == [token for token in generated if token not in tokenizer.eos_ids]
    messages = [{"role": "user", "content": "What is 3 plus one?"}]
    theirs_chat = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == theirs_chat["input_ids"]


def test_training_lowers_bits_per_byte(line):
    stages = line / "runs/small/stages"
    evaluated = json.loads((stages / "evaluate" / "results.json").read_text(encoding="utf-8"))
    validation = TokenShards(follow(line / "runs/small/tokens") / "validation")
    assert evaluated["scored"] == {"documents": validation.document_count, "bytes": validation.bytes}
    untrained = bits_per_byte(
        bessemer.load_model(stages / "model" / "model"), validation, context_length=64, batch_size=4
    ).bits_per_byte
    assert evaluated["bits_per_byte"]["pretrain"] < untrained - 0.1


def test_the_report_is_one_file_that_asks_for_nothing_else(line):
    page = (line / "runs/small/report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    for outside in ('src="http', "src='http", 'href="http', "@import", "url(http"):
        assert outside not in page
    for title in ("pretrain", "sft", "tokenize", "select"):
        assert title in page


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["small"], ["runs/small/model"], ["runs/small/tokenizer"], ["runs/small/corpus"], ["runs/small/tokens"]],
    ids=lambda arguments: arguments[0],
)
def test_show_draws_whatever_it_is_given(line, capsys, monkeypatch, arguments):
    monkeypatch.chdir(line)
    if arguments == ["run"]:
        arguments = ["runs/small"]
    assert len(command(capsys, "show", *arguments).splitlines()) > 3


def test_generate_prints_a_continuation_and_repeats_it_with_a_seed(line, capsys, monkeypatch):
    monkeypatch.chdir(line)
    options = ["generate", "small", "Return the", "--max-tokens", 12, "--temperature", 1, "--seed", 3]
    text = command(capsys, *options)
    assert text.strip()
    assert command(capsys, *options) == text


def test_a_prompt_longer_than_the_context_is_one_line(line, capsys, monkeypatch):
    monkeypatch.chdir(line)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "small", "word " * 3000])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert "context" in error


def test_chat_answers_line_by_line(line, capsys, monkeypatch):
    import io

    monkeypatch.chdir(line)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 3 plus one?\n/new\n/quit\n"))
    assert command(capsys, "chat", "small", "--max-tokens", 8).endswith("\n")


def test_openai_client_streams_from_the_server(line):
    from openai import OpenAI

    from bessemer.serving.config import ServingConfig
    from bessemer.serving.server import address_of, create_server, listen

    engine = bessemer.Engine(follow(line / "runs/small/model"))
    listener = listen("127.0.0.1", 0)
    server = create_server(engine, "small", ServingConfig())
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    try:
        client = OpenAI(base_url=f"{address_of(listener)}/v1", api_key="none")
        question = [{"role": "user", "content": "What is 3 plus one?"}]
        options = {"model": "small", "messages": question, "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(**options)
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
        assert "".join(pieces) == whole.choices[0].message.content
        assert whole.usage.completion_tokens <= 8
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def test_compare_shows_the_setting_that_differs(line, capsys, monkeypatch):
    monkeypatch.chdir(line)
    bessemer.run("recipe.yaml", {"model.num_hidden_layers": 1}, until="model")
    printed = command(capsys, "compare", "small", "small-2")
    assert "num_hidden_layers" in printed


def test_shards_of_another_tokenizer_are_refused(line, monkeypatch):
    from bessemer.core.errors import ArtefactError
    from bessemer.training.pretrain import pretrain
    from bessemer.training.pretrain_config import PretrainConfig

    monkeypatch.chdir(line)
    bessemer.run("recipe.yaml", {"tokenize.vocab_size": 400}, until="model", name="other")
    config = PretrainConfig(steps=2, dtype="float32", compile=False)
    (line / "refused").mkdir()
    with pytest.raises(ArtefactError, match="tokenizer"):
        pretrain(
            config,
            follow(line / "runs/other/model"),
            follow(line / "runs/small/tokens"),
            line / "refused",
            seed=0,
            device="cpu",
        )
