import json
from collections import Counter

import pytest

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.hashing import hash_file
from bessemer.core.metrics import read_metrics
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.pipeline.recipe import load_recipe
from bessemer.posttraining.data.examples import files_fingerprint, read_conversations
from bessemer.posttraining.data.packing import pack_conversations
from bessemer.posttraining.sft.config import SFT_VERSION, SFTConfig
from bessemer.posttraining.sft.stage import gather_conversations, sft
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.objectives import next_token_loss
from tests.golden import checksum, exact_weights
from tests.training.test_pretrain import GOLDEN_SHAPE

QUICK = {
    "train_questions": 12,
    "validation_questions": 5,
    "batch_size": 2,
    "context_length": 96,
    "dtype": "float32",
    "compile": False,
    "threads": 1,
}


def lines(*answers):
    records = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]} for answer in answers]
    return "".join(json.dumps(record) + "\n" for record in records)


def test_the_stage_leaves_a_model_that_has_learned_its_answers(model_folder, documents, tmp_path):
    config = SFTConfig(**QUICK, epochs=30, optimizer="muon", learning_rate=0.02)
    summary = sft(config, model_folder, documents, tmp_path, seed=1, device="cpu")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model", "checkpoints", "conversations", "metrics.jsonl", "autotune.json"}
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < losses[0] / 3
    assert len(read_conversations(tmp_path / "conversations" / "train.jsonl")) == summary["conversations"] == 12
    assert len(read_conversations(tmp_path / "conversations" / "validation.jsonl")) == summary["held_out"] == 5
    assert summary["steps"] == -(-30 * summary["rows"] // 2)
    json.dumps(summary, allow_nan=False)


def test_it_is_validated_on_conversations_held_out_while_it_trains(model_folder, documents, tmp_path):
    config = SFTConfig(**QUICK, steps=6, evaluate_every=2)
    sft(config, model_folder, documents, tmp_path, seed=1, device="cpu")
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "validation_loss" in record] == [2, 4, 6]
    tokenizer = load_tokenizer(model_folder)
    held_out = read_conversations(tmp_path / "conversations" / "validation.jsonl")
    rows = pack_conversations(held_out, tokenizer, config.context_length).batch
    expected = next_token_loss(load_model(tmp_path / "model"), rows).item()
    assert records[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)


def test_conversations_that_are_all_too_long_are_refused(model_folder, documents, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "a " * 200}, {"role": "assistant", "content": "b"}]}),
        encoding="utf-8",
    )
    with pytest.raises(SourceError, match="none of the 1 conversations"):
        sft(
            SFTConfig(**QUICK, data=[str(path)], validation_share=0), model_folder, None, tmp_path / "out", seed=1, device="cpu"
        )


def test_golden_output(tokenized, documents, tmp_path):
    """When this fails because the output was meant to change, raise SFT_VERSION and renew the figures."""
    model = exact_weights(Decoder(ModelConfig(**GOLDEN_SHAPE | {"max_position_embeddings": 128}, vocab_size=320)))
    save_model(model, tmp_path / "start", tokenizer=tokenized / "tokenizer")
    sft(SFTConfig(**QUICK, steps=4, learning_rate=2e-3), tmp_path / "start", documents, tmp_path, seed=1, device="cpu")
    questions = [hash_file(tmp_path / "conversations" / f"{split}.jsonl", bits=64) for split in ("train", "validation")]
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    sums = [checksum(weight) for weight in load_model(tmp_path / "model").blocks[1].parameters()]
    assert (SFT_VERSION, questions) == (9, ["6c56696c4ae0a15d", "a19dfbe5c59c00a6"])
    assert losses == pytest.approx([5.83615, 5.658186, 5.762356, 5.507305], rel=1e-4)
    assert sums == pytest.approx(
        [0.58108, 2.39967, 0.93768, -0.4613, 0.8773, 0.72159, 0.72524, 0.59046, 1.59792, 0.80521, -0.75766], abs=1e-3
    )


def test_run_again_it_goes_on_from_its_checkpoint(model_folder, documents, tmp_path):
    config = SFTConfig(**QUICK, steps=4)
    first = sft(config, model_folder, documents, tmp_path, seed=1, device="cpu")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert sft(config, model_folder, documents, tmp_path, seed=1, device="cpu") == first
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights


def asked(*pairs):
    return "".join(json.dumps({"prompt": question, "completion": answer}) + "\n" for question, answer in pairs)


def test_a_file_is_split_by_what_is_asked_so_that_no_held_out_prompt_is_learnt(tmp_path):
    pairs = [(f"What is the number {number}? ", f"{number}, {times}") for number in range(200) for times in range(2)]
    (tmp_path / "chat.jsonl").write_text(asked(*pairs), encoding="utf-8")
    config = SFTConfig(data=["chat.jsonl"], validation_share=0.2)
    learned, held_out = gather_conversations(config, None, tmp_path, seed=1)
    prompts = [{one.answered.prompt for one in side} for side in (learned, held_out)]
    assert len(learned) + len(held_out) == 400 and 20 < len(prompts[1]) < 60 and not prompts[0] & prompts[1]
    # a shorter file leaves every prompt on its side
    (tmp_path / "chat.jsonl").write_text(asked(*pairs[:200]), encoding="utf-8")
    again = gather_conversations(config, None, tmp_path, seed=1)[1]
    assert {one.id for one in again} <= {one.id for one in held_out}


def test_a_prompt_that_two_files_have_lies_on_one_side(tmp_path):
    for name in ("a", "b"):
        pairs = [(f"{'Please: ' * (name == 'b')}{number} apples and some pears?", name) for number in range(100)]
        (tmp_path / f"{name}.jsonl").write_text(
            asked(*pairs, *((f"The {number}th?", name) for number in range(100))), encoding="utf-8"
        )
    config = SFTConfig(data=["a.jsonl", "b.jsonl"], validation_share=0.3)
    learned, held_out = gather_conversations(config, None, tmp_path, seed=1)
    both = [{one.answered.prompt for one in side if one.answered.prompt.startswith("The")} for side in (learned, held_out)]
    assert both[0] and both[1] and not both[0] & both[1]


def test_the_fingerprint_follows_the_files_content(tmp_path):
    config = SFTConfig(data=["chat.jsonl"])
    with pytest.raises(SourceError, match="there is no such file"):
        files_fingerprint(config.data, tmp_path)
    prints = []
    for answer in ("a", "b"):
        (tmp_path / "chat.jsonl").write_text(lines(answer), encoding="utf-8")
        prints.append(files_fingerprint(config.data, tmp_path))
    assert prints[0] != prints[1]


def test_questions_need_documents_that_give_some(tmp_path):
    with pytest.raises(SourceError, match="no stage of this recipe makes any"):
        gather_conversations(SFTConfig(), None, tmp_path, seed=1)


def test_a_tasks_items_are_learnt_with_their_right_answers(tmp_path):
    training, held_out = gather_conversations(SFTConfig(data=["task/sums"], task_items=50), None, tmp_path, seed=1)
    assert len(training) == 50 and not held_out
    asked, answered = (message["content"] for message in training[0].messages)
    assert answered == str(eval(asked.removesuffix(" =")))
    with pytest.raises(ConfigError, match=r"the task constraints knows no right answers"):
        gather_conversations(SFTConfig(data=["task/constraints"]), None, tmp_path, seed=1)


def test_a_set_comes_as_often_as_its_weight_says_and_what_is_held_out_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(lines(*(f"{name}{number}" for number in range(40))), encoding="utf-8")
    data = {"data": ["a.jsonl", "b.jsonl"], "validation_share": 0.25}
    once, held_out = gather_conversations(SFTConfig.parse(data), None, tmp_path, seed=1)
    weights = {"a.jsonl": 2.5, "b.jsonl": 0.5}
    training, same_held_out = gather_conversations(SFTConfig.parse(data | {"weights": weights}), None, tmp_path, seed=1)
    assert same_held_out == held_out
    for source, weight in weights.items():
        ids = [one.id for one in once if one.source == source]
        times = Counter(one.id for one in training if one.source == source)
        assert sum(times.values()) == pytest.approx(weight * len(ids), abs=0.5)
        assert set(times.values()) <= {int(weight), int(weight) + 1}
    for wrong, said in (({"c.jsonl": 2}, "is not in data"), ({"a.jsonl": 0}, "more often than never")):
        with pytest.raises(ConfigError, match=said):
            SFTConfig.parse(data | {"weights": wrong})


def test_data_that_is_unknown_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'made/docs_questions'"):
        SFTConfig.parse({"data": ["made/doc_questions"]}, "sft")
    assert SFTConfig.parse(["a.jsonl"], "sft").data == ["a.jsonl"]


def test_conversations_come_from_a_function_of_the_users(tmp_path):
    (tmp_path / "own.py").write_text(
        "def rows():\n    for n in range(40):\n        yield {'prompt': f'{n}?', 'completion': f'{n}!'}\n"
        "def none():\n    return []\n"
        "def bad():\n    return [{'prompt': 'a', 'completion': 'b'}, {'text': 'a'}]\n"
        "def fails():\n    raise ValueError('no')\n"
        "def texts():\n    return ['a']\n",
        encoding="utf-8",
    )
    config = SFTConfig(data=["own.py:rows"], validation_share=0.25)
    assert config.user_functions() == ["own.py:rows"]
    training, held_out = gather_conversations(config, None, tmp_path, seed=1)
    assert len(training) + len(held_out) == 40 and held_out and training[0].source == "own.py:rows"
    assert training[0].answered.answer == training[0].answered.prompt.replace("?", "!")
    for function, problem in {
        "none": "gives no row",
        "bad": "row 2: is in no known format",
        "fails": "it failed: ValueError: no",
        "texts": "row 1 must be a dict, it is 'a'",
    }.items():
        with pytest.raises(SourceError, match=problem):
            gather_conversations(SFTConfig(data=[f"own.py:{function}"]), None, tmp_path, seed=1)
    with pytest.raises(ConfigError, match="has no function 'rest'"):
        gather_conversations(SFTConfig(data=["own.py:rest"]), None, tmp_path, seed=1)


def test_the_defaults_are_those_of_tuning_a_model_that_was_pretrained_elsewhere():
    config = SFTConfig.parse({"data": ["chat.jsonl"]}, "sft")
    assert (config.optimizer, config.learning_rate, config.epochs, config.context_length) == ("adamw", 2e-5, 3.0, 2048)
    adapted = SFTConfig.parse({"data": ["chat.jsonl"], "adapter": 16}, "sft")
    assert (adapted.optimizer, adapted.learning_rate) == ("adamw", 2e-4)


def test_rows_are_as_long_as_the_models_context_where_nothing_is_said(model_folder, tmp_path):
    (tmp_path / "chat.jsonl").write_text(lines("one", "two", "three"), encoding="utf-8")
    values = {name: value for name, value in QUICK.items() if name != "context_length"}
    # as the pipeline changes settings before the stage runs
    config = SFTConfig.parse({**values, "data": ["chat.jsonl"], "validation_share": 0}).with_changes(steps=1)
    sft(config, model_folder, None, tmp_path, seed=1, device="cpu", folder=tmp_path)
    longest = load_model(model_folder).config.max_position_embeddings
    assert longest < config.context_length == 2048
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["tokens"] == 2 * longest
    with pytest.raises(ConfigError, match=f"context_length 2,048 exceeds the model's max_position_embeddings {longest}"):
        sft(config.with_changes(context_length=2048), model_folder, None, tmp_path, seed=1, device="cpu", folder=tmp_path)


@pytest.mark.parametrize("name", ["quickstart", "chat", "10m", "ladder"])
def test_recipes_of_small_models_say_how_theirs_is_tuned(name):
    given = load_recipe(name).stage("sft").config
    assert {"optimizer", "learning_rate", "epochs", "context_length"} <= given.model_fields_set
    assert (given.optimizer, given.context_length, given.batch_size) == ("muon", 256, 8)
    assert (given.learning_rate, given.epochs) == ((4e-3, 3.5) if name == "quickstart" else (1e-3, 15))
