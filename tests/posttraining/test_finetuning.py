"""`bessemer finetune`: from a model and a table to an adapter that serves, and an honest end."""

import csv
import gc
import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from bessemer.cli.finetune import _result
from bessemer.cli.main import main
from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.metrics import read_metrics
from bessemer.core.progress import Silent
from bessemer.core.store import read_json, write_json
from bessemer.core.yaml_file import parse_yaml
from bessemer.distributed.mesh import ALONE
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.model.adapters.trained import adapter_of, adapters_of, add_adapters, merged
from bessemer.model.config import ModelConfig
from bessemer.model.formats import ModelSource
from bessemer.model.initialisation import initial_decoder
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.storage.folder import load_model, save_model
from bessemer.posttraining.data.examples import Conversation
from bessemer.posttraining.sft import finetune_memory
from bessemer.posttraining.sft.config import FinetuneConfig, SFTConfig
from bessemer.posttraining.sft.finetune import Finetuned, _Questions, _Samples, _training_settings
from bessemer.posttraining.sft.finetune_inputs import find_columns, prepare_base
from bessemer.posttraining.sft.finetune_memory import TuningShape, tuning_memory
from bessemer.posttraining.sft.finetune_plan import (
    Sizes,
    choose_method,
    memory_needs,
    plan_finetuning,
    row_length,
    settings_of,
)
from bessemer.posttraining.sft.forgetting import Limits, forgetting
from bessemer.posttraining.sft.report import verdict
from bessemer.tasks.questions import ItemResult
from bessemer.tasks.registry import read_task
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training import chunked_head
from bessemer.training.data.batch import Batch
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import NextTokenObjective
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.runtime import Runtime
from bessemer.training.starting_model import FROZEN, StartingModel, read_quantised
from bessemer.training.trainer import Trainer
from tests.cases import in_turn, slow_but
from tests.cli.test_main import bessemer, one_error
from tests.literate import blocks
from tests.posttraining.test_formats import said
from tests.scaling.live_memory import LiveMemory, storage_bytes
from tests.training.conftest import RecordedProgress

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [(f"Where is order {n}?", f"Order {n} is on its way.") for n in range(60)]


def write_table(path, rows=ROWS, header=("ticket", "answer")):
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def test_rows_are_as_long_as_leaves_the_fewest_tokens_empty():
    lengths = [64, *[40] * 10]
    # in rows of 64 each stands alone, 704 tokens; of 128 there are four, 512; of 192 three, 576
    assert row_length(lengths, 2048) == 128
    assert (row_length(lengths, 100), row_length(lengths, 50)) == (64, 50)


def test_the_recipe_of_the_page_trains_as_the_command_does(tmp_path):
    page = Path(__file__).parents[2] / "docs/finetune.md"
    recipe = next(parse_yaml(block.text, "finetune.md").values for block in blocks(page) if block.text.startswith("model:"))
    in_recipe, table = SFTConfig.parse(recipe["sft"]), write_table(tmp_path / "tickets.csv")
    config, rows = FinetuneConfig(method="lora"), 40
    sizes = Sizes.of(config, in_recipe.context_length, rows, in_recipe.batch_size)
    settings = _training_settings(config, "lora", sizes, device=torch.device("cpu"))
    by_command = SFTConfig.parse(settings_of(config, table) | settings)
    # how long it is the command says in steps
    assert by_command.steps == in_recipe.epochs * rows / in_recipe.batch_size
    chosen = {"data", "steps", "epochs", "evaluate_every", "dtype"}
    assert by_command.model_dump(exclude=chosen) == in_recipe.model_dump(exclude=chosen)


def test_a_table_becomes_an_adapter_that_serves_and_the_end_is_honest(model_folder, tmp_path, capsys):
    table, out = write_table(tmp_path / "tickets.csv"), tmp_path / "out"
    asked = [
        "finetune",
        model_folder,
        table,
        out,
        "--method",
        "lora",
        "--learning-rate",
        0.01,
        "--epochs",
        4,
        "--device",
        "cpu",
    ]
    code, printed, err = bessemer(capsys, *asked)
    assert code == 0, err
    verdict, command = printed.splitlines()[-2:]
    assert verdict.startswith("better than before on what was held out: yes, much better. Loss ")
    assert command == f"use it: bessemer chat {out} · bessemer serve {out} · bessemer export {out} out.gguf"
    record = read_json(out / "finetune.json")["result"]
    assert [sorted(one) for one in record["answers"]] == [["after", "before", "prompt", "reference"]] * 3
    assert all(one["before"] != one["after"] for one in record["answers"])
    assert f"  {record['answers'][0]['prompt']}" in printed.splitlines()
    low, high = record["interval"]
    assert 0 < low < record["difference"] < high and record["conversations"] > 2
    # what the training itself saw held out, as a mean over tokens instead of conversations
    losses = [line["validation_loss"] for line in read_metrics(out / "metrics.jsonl") if "validation_loss" in line]
    assert losses[-1] == pytest.approx(record["loss_after"], abs=0.1) and losses[0] < record["loss_before"]
    task = read_task(out / "held_out.yaml")
    assert len(task.questions()) == record["conversations"] and task.generation.max_tokens > 8
    engine = Engine(model_folder)
    engine.load_adapter("tickets", out / "adapter")
    messages = [{"role": "user", "content": "Where is order 7?"}]
    greedily = SamplingParams(max_tokens=12, temperature=0)
    plain, tuned = (engine.chat(messages, greedily, adapter=name).text for name in (None, "tickets"))
    assert tuned != plain

    forgotten = record["forgetting"]
    assert list(forgotten["tasks"]) == ["general_knowledge", "general_texts"] and forgotten["verdict"] in printed
    # the same items before and after; the little model's context does not hold all of them
    assert 60 < forgotten["items"] < 82 and forgotten["rise"] == pytest.approx(
        forgotten["loss_after"] - forgotten["loss_before"]
    )
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("Forgotten", "Answers side by side", record["answers"][0]["after"][:5]))

    assert not (out / "checkpoints").exists()
    # a finished fine-tuning is judged again, by other limits
    code, _, err = bessemer(capsys, *asked, "--min-improvement", 50, "--max-loss", 0, "--fail-if-worse")
    assert code == 3 and [line.split(":")[1].split()[0] for line in err.splitlines()] == ["--min-improvement", "--max-loss"]
    again, printed, _ = bessemer(capsys, *asked)
    assert (again, printed.splitlines()[-2]) == (0, verdict) and not (out / "model").exists()
    assert bessemer(capsys, *asked, "--merge")[0] == 0 and (out / "model" / "config.json").exists()
    _, _, err = bessemer(capsys, *asked, "--rank", 4)
    assert "holds another fine-tuning, of other data, another model or settings" in one_error(err)


def test_copies_of_a_row_are_one_piece_of_evidence(model_folder, tmp_path):
    found = []
    for times in (1, 3):
        table, source = write_table(tmp_path / f"tickets{times}.csv", ROWS * times), ModelSource("folder", str(model_folder))
        config, where = FinetuneConfig(method="lora"), {"device": "cpu", "scratch": tmp_path}
        found.append([one.id for one in plan_finetuning(config, source, str(table), seed=0, **where).held_out])
    assert found[0] == found[1] and len(found[0]) > 2


def test_samples_are_of_questions_that_the_model_can_read(model_folder):
    tokenizer, model, progress = load_tokenizer(model_folder), load_model(model_folder), RecordedProgress()
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "order", "arguments": {}}}]}
    conversations = [
        [said("user", "Where? " * 400), said("assistant", "Here.")],
        [said("user", "Where?"), call, said("assistant", "Here.")],
        [said("user", "Where?"), said("assistant", "There.")],
    ]
    held_out = [Conversation.of(messages, "a.jsonl") for messages in conversations]
    questions = _Questions(held_out, tokenizer, model.config.max_position_embeddings)
    _Samples(questions, 5, progress).show(3, model)
    assert [line.partition(" → ")[0] for line in progress.lines] == ["  step 3: Where?"]
    _Samples(_Questions(held_out[:1], tokenizer, model.config.max_position_embeddings), 5, progress).show(4, model)
    # the end has answers of its own
    _Samples(questions, 5, progress).show(5, model)
    assert len(progress.lines) == 1


@pytest.mark.parametrize(("scheme", "dtype"), in_turn([None, "int8"], ["float32", "bfloat16"]))
def test_samples_of_a_model_with_an_adapter_are_those_of_the_merged_one(model_folder, scheme, dtype):
    tokenizer, model = load_tokenizer(model_folder), load_model(model_folder, dtype=torch.float32)
    if scheme is not None:
        quantise(model, QuantizeConfig(scheme=scheme, head="none"))
    add_adapters(model, rank=4, scale=2.0)
    generator = torch.Generator().manual_seed(1)
    for update in adapters_of(model).values():
        for half in (update.down, update.up):
            half.data.normal_(0, 0.2, generator=generator)
    held_out = [Conversation.of([said("user", "Where?"), said("assistant", "There.")], "a.jsonl")]
    lines, autocast = [], dtype == "bfloat16"
    for shown in (model, merged(model, adapter_of(model))):
        progress = RecordedProgress()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _Samples(_Questions(held_out, tokenizer, model.config.max_position_embeddings), 4, progress).show(3, shown.eval())
        lines += progress.lines
    assert len(lines) == 2 and all(line.startswith("  step 3: Where? → ") for line in lines)
    if not autocast:
        assert lines[0] == lines[1]


def test_further_files_come_as_often_as_is_said(tmp_path):
    table = write_table(tmp_path / "tickets.csv")
    others = write_table(tmp_path / "more.csv", ROWS[:20])
    renamed = write_table(tmp_path / "renamed.csv", ROWS[:20], ("question", "reply"))
    settings = settings_of(FinetuneConfig(also={str(others): 3.0}), table)
    assert settings["data"] == [str(table), str(others)] and settings["weights"] == {str(others): 3.0}
    with pytest.raises(ConfigError, match=r"renamed.csv: its columns are .* call them alike"):
        settings_of(FinetuneConfig(also={str(renamed): 1.0}), table)


@pytest.mark.parametrize("also", ["more.csv=often", "=2", "more.csv=0"])
def test_times_that_are_none_are_one_line(model_folder, tmp_path, capsys, also):
    write_table(tmp_path / "more.csv")
    asked = ("finetune", model_folder, write_table(tmp_path / "tickets.csv"), tmp_path / "out", "--also", also)
    code, _, err = bessemer(capsys, *asked)
    assert code == 2 and one_error(err) and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_whole_and_quantised_models_are_tuned_too(model_folder, tmp_path, capsys, method):
    out = tmp_path / "out"
    table = write_table(tmp_path / "tickets.csv")
    asked = ["finetune", model_folder, table, out, "--method", method, "--learning-rate", 0.01, "--merge", "--device", "cpu"]
    code, printed, _ = bessemer(capsys, *asked)
    assert code == 0 and "held out: yes" in printed
    assert (out / "adapter").exists() == (method == "qlora") and (out / "model/config.json").exists()


@pytest.mark.parametrize(
    ("rows", "header", "options", "message"),
    [
        (ROWS, ("one", "two"), (), "none of 'one', 'two' tells by its name; name the column with --prompt-column"),
        (ROWS, ("question", "input"), (), "'question' and 'input' could both be meant"),
        (ROWS, ("question", "text"), ("--answer-column", "texts"), "there is no column 'texts'; did you mean 'text'"),
        ([*ROWS, *[("Hello?", "")] * 4], ("ticket", "answer"), (), "4 of 64 rows cannot be used, more than a twentieth"),
        (ROWS[:3], ("ticket", "answer"), (), "too few to tell whether the model got better"),
        (ROWS, ("ticket", "answer"), ("--method", "laura"), "--method"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model_folder, tmp_path, capsys, rows, header, options, message):
    table = write_table(tmp_path / "tickets.csv", rows, header)
    code, _, err = bessemer(capsys, "finetune", model_folder, table, tmp_path / "out", *options)
    assert code == 2 and message in one_error(err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("notes", "holds no table and no text"),
        ("notes.txt", "of 1 rows 0 different ones would be held out"),
        ("notes.pdf", "is no table, and no text; {source: pdf} reads such files, and texts without questions are learnt by"),
        ("notes.zip", "not .zip; unpack it, and name the table in it"),
    ],
)
def test_what_is_no_table_and_too_little_text_is_told_with_what_to_do(model_folder, tmp_path, capsys, name, why):
    path = tmp_path / name
    if name == "notes":
        path.mkdir()
    else:
        path.write_text("Steel.", encoding="utf-8")
    code, _, err = bessemer(capsys, "finetune", model_folder, path, tmp_path / "out")
    assert code == 2 and why in one_error(err) and not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_stays(model_folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("Dear Ada", encoding="utf-8")
    code, _, err = bessemer(capsys, "finetune", model_folder, write_table(tmp_path / "t.csv"), tmp_path / "out")
    assert code == 2 and "exists already and is not empty" in one_error(err)


def test_columns_are_found_by_their_names_and_conversations_stay_what_they_are(tmp_path):
    assert find_columns(write_table(tmp_path / "a.csv", header=("Ticket ", "ANSWER")), None, None) == ("Ticket ", "ANSWER")
    assert find_columns(write_table(tmp_path / "b.csv", header=("text", "answer")), "text", None) == ("text", "answer")
    for row in ({"messages": []}, {"instruction": "a", "input": "", "output": "b"}, {"conversations": []}):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        assert find_columns(path, None, None) is None
    with pytest.raises(SourceError, match="cannot be question and answer both"):
        find_columns(tmp_path / "b.csv", "answer", None)


def test_memory_chooses_the_method():
    model = ModelConfig(vocab_size=32_000, hidden_size=2048, num_hidden_layers=16, intermediate_size=8192)
    weights = model.parameters()
    shape = TuningShape(rows=1, length=512, frozen=FROZEN["int4"])

    def chosen(free, shape=shape):
        return choose_method(memory_needs(model, shape, free), free, is_quantised=shape.stored is not None)

    assert [chosen(factor * weights)[0] for factor in (20.0, 8.0, 4.0)] == ["full", "lora", "qlora"]
    assert chosen(4.0 * weights, replace(shape, stored=1.0 * weights)) == ("qlora", "the model is quantised")
    with pytest.raises(ConfigError, match=r"--method: even qlora takes about"):
        chosen(0.5 * weights)


def test_a_smaller_micro_batch_comes_before_recomputed_blocks_and_these_before_another_method():
    model = ModelConfig(vocab_size=4096, hidden_size=256, num_hidden_layers=8, intermediate_size=704)
    shape, both = TuningShape(rows=8, length=512, frozen=FROZEN["int4"]), ("none", "full")
    whole = memory_needs(model, shape, float("inf"), recompute=both)["full"]
    assert (whole.shape.rows, whole.shape.micro_batches, whole.shape.recompute) == (8, 1, "none")
    less = memory_needs(model, shape, whole.memory.peak - 1, recompute=both)["full"].shape
    assert (less.rows, less.micro_batches, less.recompute) == (4, 2, "none")
    one = memory_needs(model, shape, 0.0)["full"]
    least = memory_needs(model, shape, one.memory.peak - 1, recompute=both)["full"].shape
    assert (least.recompute, least.rows * least.micro_batches) == ("full", 8)
    # a budget of tokens stays what it is
    given = memory_needs(model, replace(shape, rows=2, micro_batches=4), 0.0, rows_given=True)["full"].shape
    assert (given.rows, given.micro_batches) == (2, 4)


@pytest.mark.parametrize(
    ("method", "dtype", "recompute"),
    slow_but(
        [("lora", "bfloat16", "none")],
        product(("full", "lora", "qlora"), ("float32", "bfloat16"), ("none", "selective", "full")),
    ),
)
def test_the_memory_that_is_announced_is_that_of_a_step(tmp_path, method, dtype, recompute):
    announced, counted = announced_and_counted(tmp_path, method, dtype, recompute)
    assert announced == pytest.approx(counted, rel=0.1)


def test_without_compiled_kernels_the_logits_in_float32_are_announced_too(tmp_path, monkeypatch):
    for module in (finetune_memory, chunked_head):
        monkeypatch.setattr(module, "library", lambda: None)
    announced, counted = announced_and_counted(tmp_path, "lora", "bfloat16", "none")
    assert announced == pytest.approx(counted, rel=0.1)


def announced_and_counted(tmp_path, method, dtype, recompute):
    """Bytes at the peak of a step on the CPU: as announced, and counted tensor by tensor in the second step, with the
    optimizer's means."""
    rows, length = 4, 64
    shape = ModelConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    save_model(initial_decoder(shape, seed=1), tmp_path / "model", tokenizer=None)
    quantize = {"quantize": "int4"} if method == "qlora" else {}
    adapter = {} if method == "full" else {"adapter": {"rank": 16, **quantize}}
    settings = {"data": ["a.jsonl"], "dtype": dtype, "steps": 2, "compile": False, "threads": 1, "batch_size": rows}
    settings |= {"context_length": length, "activation_checkpointing": recompute, "optimizer": "adamw"}
    config = SFTConfig.parse(settings | adapter, "sft")
    runtime = Runtime.of(config, torch.device("cpu"))
    model = StartingModel.of(tmp_path / "model", config, seed=1).whole("cpu")
    prepare_model(model, config, runtime, ALONE)
    optimizers = build_optimizers(model, config)
    trainer = Trainer(model, optimizers, NextTokenObjective(shape), runtime, gradient_clip=1.0)
    tokens_BT = torch.randint(0, shape.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    positions_BT = torch.arange(length).expand(rows, length).contiguous()
    batch = Batch(tokens_BT, tokens_BT, positions_BT, torch.ones_like(tokens_BT))
    trainer.step(batch)
    means = [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    standing = [*model.parameters(), *model.buffers(), *means]
    gc.collect()
    with LiveMemory(standing) as live:
        trainer.step(batch)
    counted = storage_bytes(standing) + live.peak
    sizes = TuningShape(rows, length, getattr(torch, dtype).itemsize, frozen=FROZEN["int4"], recompute=recompute)
    return tuning_memory(shape, method, sizes).peak, counted


@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_a_model_that_is_quantised_as_it_is_read_has_the_same_codes(model_folder, scheme):
    whole, read = load_model(model_folder), read_quantised(model_folder, FROZEN[scheme], "cpu")
    quantise(whole, FROZEN[scheme])
    expected, found = whole.state_dict(), read.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_memory_that_is_announced_is_that_of_the_whole_process(model_folder, tmp_path, method):
    """Of a little model nearly all is the interpreter and its libraries."""
    out, table = tmp_path / "out", write_table(tmp_path / "tickets.csv")
    command = [sys.executable, "-m", "bessemer", "finetune", model_folder, table, out, "--method", method, "--epochs", "0.3"]
    subprocess.run([*map(str, command), "--device", "cpu"], check=True, capture_output=True)
    memory = read_json(out / "finetune.json")["result"]["memory"]
    assert memory["announced"] == pytest.approx(memory["taken"], rel=0.1, abs=30e6)


def test_a_seven_billion_model_is_announced_with_one_copy_of_its_weights():
    shape = ModelConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        tie_word_embeddings=False,
    )
    sizes = TuningShape(rows=1, length=512)
    wide, half = (tuning_memory(shape, "lora", replace(sizes, dtype_bytes=width)).peak for width in (4, 2))
    assert half < 3.0 * shape.parameters() < 4.0 * shape.parameters() < wide
    full, full_wide = (tuning_memory(shape, "full", replace(sizes, dtype_bytes=width)).peak for width in (2, 4))
    # weights, gradients and means; copies for products go before the last gradients come
    assert full > 14 * shape.parameters() and full_wide > 16 * shape.parameters()


def test_a_model_without_a_chat_template_gets_one_whose_tokens_it_knows(model_folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(model_folder, plain)
    settings = read_json(plain / "tokenizer_config.json")
    write_json(plain / "tokenizer_config.json", {name: value for name, value in settings.items() if name != "chat_template"})
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    base = prepare_base(ModelSource("folder", str(plain)), tmp_path / "base", Silent())
    assert base == tmp_path / "base" and load_tokenizer(base).chat_template == load_tokenizer(model_folder).chat_template
    assert {path.name: path.read_bytes() for path in plain.iterdir()} == before
    assert prepare_base(ModelSource("folder", str(model_folder)), tmp_path / "other", Silent()) == model_folder


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([1.0, 1.1, 0.9, 1.2], "yes, much better"),
        ([1.9, 2.1, 1.71, 2.0], "yes, clearly better"),
        ([1.97, 2.17, 1.77, 2.07], "yes, a little better"),
        ([3.0, 3.1, 2.9, 3.2], "no, much worse"),
        ([2.5, 1.5, 2.4, 1.7], "undecided"),
    ],
)
def test_the_verdict_has_a_size_and_needs_an_interval_on_one_side_of_zero(after, said):
    found = verdict(np.array([2.0, 2.2, 1.8, 2.1]), np.array(after))
    assert f"held out: {said}. Loss 2.025 →" in found["verdict"]
    assert found["better"] == said.startswith("yes")
    assert found["size"] == (None if said == "undecided" else said.split(", ")[1].rpartition(" ")[0])


def test_the_end_counts_what_was_learnt_cut_and_left_out(tmp_path):
    figures = {"conversations": 9, "too_long": 2, "nothing_learnt": 1, "cut": 3}
    losses = np.array([2.0, 2.2])
    result = _result(Finetuned("lora", tmp_path, "hash", ["a", "b"], losses, losses - [0.5, 0.6], [], figures))
    assert result["data"] == (
        "conversations learnt: 6, of which 3 with their beginning cut off; left out: 2 longer than a row, 1 without anything "
        "to learn"
    )
    assert result["losses"] == {"a": [2.0, 1.5], "b": [2.2, pytest.approx(1.6)]}


def test_forgetting_is_the_mean_rise_of_the_same_items():
    before = {"a": {"1": ItemResult(1.0, 1.0), "2": ItemResult(0.0, 3.0)}, "b": {"1": ItemResult(0.0, 2.0)}}
    after = {"a": {"1": ItemResult(1.0, 1.5), "2": ItemResult(1.0, 3.4)}, "b": {"1": ItemResult(0.0, 2.6)}}
    figures = forgetting(before, after)
    # rises 0.5, 0.4, 0.6: mean 0.5, standard error 0.1 / √3, t of two degrees of freedom 4.303
    half = 4.303 * 0.1 / 3**0.5
    assert figures["interval"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-3) and figures["forgot"]
    assert (figures["rise"], figures["size"]) == (pytest.approx(0.5), "clearly")
    task = figures["tasks"]["a"]
    assert (task["accuracy_before"], task["accuracy_after"], task["rise"]) == (0.5, 1.0, pytest.approx(0.45))
    assert figures["tasks"]["b"]["interval"] is None
    assert not forgetting(after, before)["forgot"]
    assert "no, these became likelier" in forgetting(after, before)["verdict"]


def test_a_limit_is_broken_by_certain_harm_alone():
    better = {"difference": 0.5, "interval": [0.4, 0.6], "loss_after": 1.0}
    unsure = {"difference": -0.1, "interval": [-0.3, 0.1], "loss_after": 1.6}
    worse = {"difference": -0.5, "interval": [-0.6, -0.4], "loss_after": 2.0, "forgetting": {"rise": 0.3}}
    found = [len(Limits(fail_if_worse=True).broken(result)) for result in (better, unsure, worse)]
    assert found == [0, 0, 1]
    assert len(Limits(min_improvement=0.2, max_loss=1.5, max_forgetting=0.2).broken(worse)) == 3
    with pytest.raises(ConfigError, match="ended without general tasks"):
        Limits(max_forgetting=0.2).broken(better)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--general", "arithmetic"), "the task arithmetic generates answers; name tasks that are answered by likelihood"),
        (("--general", "none", "--max-forgetting", 0.1), "--max-forgetting: of general tasks, and --general none asks none"),
    ],
)
def test_general_tasks_are_answered_by_likelihood(model_folder, tmp_path, capsys, options, message):
    table = write_table(tmp_path / "tickets.csv")
    code, _, err = bessemer(capsys, "finetune", model_folder, table, tmp_path / "out", *options)
    assert code == 2 and message in one_error(err) and not (tmp_path / "out").exists()


# -- the data, before anything is trained


def write_calls(path, count=40):
    call = {"type": "function", "function": {"name": "find_order", "arguments": {"number": 7}}}
    rows = [
        {"messages": [said("user", f"Where is {n}?"), {"role": "assistant", "content": None, "tool_calls": [call]}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_call_that_the_template_refuses_is_refused_with_its_row(model_folder, tmp_path, capsys):
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATES["plain"], encoding="utf-8")
    table = write_calls(tmp_path / "calls.jsonl")
    code, _, err = bessemer(capsys, "finetune", base, table, tmp_path / "out")
    assert code == 2 and "has no place for tools" in one_error(err)
    assert "calls.jsonl:" in err and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def short(model_folder, tmp_path_factory):
    """A short run of the command: its table, its folder, and what it said."""
    folder, said = tmp_path_factory.mktemp("short"), io.StringIO()
    table, out = write_table(folder / "tickets.csv"), folder / "out"
    words = ("finetune", model_folder, table, out, "--method", "lora", "--epochs", 0.1, "--device", "cpu", "--general", "none")
    with redirect_stdout(io.StringIO()), redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code, said.getvalue()
    return table, out, said.getvalue()


def test_the_plan_is_what_the_command_then_does(short, model_folder, tmp_path, capsys):
    (table, out, _), before = short, sorted(tmp_path.iterdir())
    asked = ("--method", "lora", "--device", "cpu")
    code, printed, err = bessemer(capsys, "plan", "--finetune", model_folder, table, "epochs=0.1", "--json", *asked)
    plan = json.loads(printed)
    assert code == 0, err
    assert list(plan["memory_bytes"]) == ["full", "lora", "qlora"] and plan["method"] == "lora"
    assert sum(plan["memory_parts"].values()) >= plan["memory_bytes"]["lora"] and plan["seconds"] > 0
    assert plan["memory_bytes"]["full"] > plan["memory_bytes"]["lora"] and 0 < plan["learnt_tokens"] < plan["tokens"]
    _, printed, _ = bessemer(capsys, "plan", "--finetune", model_folder, table, *asked)
    # lines are broken where the model's path is long
    assert "tuned on tickets.csv" in " ".join(printed.split()) and "chosen" in printed
    assert sorted(tmp_path.iterdir()) == before and {path.name for path in table.parent.iterdir()} == {table.name, out.name}
    metrics = read_json(out / "finetune.json")["result"]["metrics"]
    assert [metrics[name] for name in ("steps", "rows", "held_out")] == [plan[name] for name in ("steps", "rows", "held_out")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("epochs=2",), "name a model and a table"), (("{table}", "epoch=2"), "did you mean 'epochs'")],
)
def test_a_plan_of_a_fine_tuning_needs_a_table_and_known_settings(model_folder, tmp_path, capsys, arguments, message):
    table = write_table(tmp_path / "tickets.csv")
    given = [one.format(table=table) for one in arguments]
    code, _, err = bessemer(capsys, "plan", "--finetune", model_folder, *given)
    assert code == 2 and message in one_error(err)


def test_an_example_is_shown_with_what_is_learnt_in_brackets(short):
    _, _, err = short
    number = re.search(r"Where is order (\d+)\?<\|im_end\|>", err).group(1)
    assert f"⟦Order {number} is on its way.<|im_end|>⟧" in err
    assert err.count("⟦") == 2  # in the line above it once
