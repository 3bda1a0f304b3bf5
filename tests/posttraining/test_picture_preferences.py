"""Preferences about pictures: packed pairs and answers, the reference, and a run that learns from what it sees alone."""

import json

import numpy as np
import pytest
import torch

from bessemer.core.errors import RequestError, SourceError
from bessemer.model.vision.folder import load_vision_language
from bessemer.model.vision.trained import load_trained_decoder
from bessemer.posttraining.data.encoding import encode_answer
from bessemer.posttraining.data.examples import files_fingerprint, gather_pairs, previewed, read_examples
from bessemer.posttraining.data.formats import as_labelled_answers, as_pair
from bessemer.posttraining.data.packing import mismatched, pack_answers, pack_pairs, placed
from bessemer.posttraining.data.picture_encoding import open_picture_encoder, picture_of
from bessemer.posttraining.data.picture_rows import sources_in
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.stage import preference
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.head import target_log_probs
from tests.cases import slow
from tests.model.picture_files import drawn, encoded, write_colours, write_gemma3_model, write_picture_model, write_qwen_model
from tests.model.tokenizers import write_small_tokenizer


def said(role, content):
    return {"role": role, "content": content}


def pair(picture, chosen, rejected):
    """TRL's form: pictures in a column, and their places in the prompt."""
    content = [{"type": "image"}, {"type": "text", "text": "which?"}]
    answers = {"chosen": [said("assistant", chosen)], "rejected": [said("assistant", rejected)]}
    return {"images": [picture], "prompt": [said("user", content)], **answers}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SmolVLM, a tiny Gemma 3, a tiny Qwen2.5-VL, and four pairs about pictures of two sizes and one about none."""
    folder = tmp_path_factory.mktemp("pairs")
    write_picture_model(folder / "smolvlm")
    write_gemma3_model(folder / "gemma3")
    write_qwen_model(folder / "qwen")
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(drawn(40 if number else 16, 30 if number else 16, seed=number)))
    rows = [pair(f"{number}.png", f"number {number}", "no" if number % 2 else "none at all") for number in range(4)]
    rows.append({"prompt": [said("user", "who?")], "chosen": [said("assistant", "me")], "rejected": [said("assistant", "you")]})
    write_rows(folder / "pairs.jsonl", rows)
    return folder


@torch.no_grad()
def log_prob_alone(folder, model, prompt, answer, where):
    """Σ log p of an answer to a prompt with pictures, by the whole model on that conversation and nothing else."""
    tokenizer = load_tokenizer(folder / model)
    pictures = open_picture_encoder(folder / model, tokenizer, folder / "unused.bin")
    example = encode_answer(prompt, answer, tokenizer, pictures=True)
    shown = [picture_of(source, where) for source in sources_in(prompt)]
    read = pictures.reader.expand(example.ids.tolist(), shown)
    tiles = [pictures.reader.preprocessor.pixels(span.prepared) for span in read.spans]
    logits = load_vision_language(folder / model)(torch.tensor([read.ids]), tiles[0] if tiles else None)[0].log_softmax(-1)
    moved = len(read.ids) - len(example.ids)
    return sum(float(logits[place + moved - 1, example.ids[place]]) for place in np.flatnonzero(example.is_learnt))


@torch.no_grad()
def log_probs(folder, model, batch):
    decoder = load_trained_decoder(folder / model).eval()
    values_BT, _ = target_log_probs(decoder, decoder.hidden(**batch.inputs), batch.targets_BT)
    return batch.sequence_sums(values_BT * (batch.targets_BT != IGNORE_INDEX))


@pytest.mark.parametrize(
    ("model", "shares"), [("smolvlm", True), slow("smolvlm", False), ("gemma3", False), slow("qwen", True)]
)
def test_packed_pairs_have_the_log_probabilities_of_each_answer_alone(folder, tmp_path, model, shares):
    tokenizer = load_tokenizer(folder / model)
    pictures = open_picture_encoder(folder / model, tokenizer, tmp_path / "pictures.bin")
    pairs, _ = gather_pairs(["pairs.jsonl"], folder, {}, 0.0, 1, pictures=True)
    packed = pack_pairs(pairs, tokenizer, 512, shares_prompts=shares, pictures=pictures)
    batch = placed(packed.batch, pictures)
    assert packed.pairs == 5 and batch.sequences > 2
    pictured = int((batch.vector_of_token_BT >= 0).sum())
    # a prompt that two answers share stands in the row once
    once = {"smolvlm": 4 * (17 + 3 * 13), "gemma3": 4 * 16, "qwen": 4 + 3 * 20}[model]
    assert pictured == (once if shares else 2 * once)
    assert not (batch.targets_BT[batch.vector_of_token_BT >= 0] != IGNORE_INDEX).any()
    sums_BS = log_probs(folder, model, batch)
    found = sorted(float(value) for value in sums_BS[batch.per_sequence["pair_weight"] > 0])
    alone = [
        log_prob_alone(folder, model, one.prompt, answer, folder) for one in pairs for answer in (one.chosen, one.rejected)
    ]
    assert found == pytest.approx(sorted(alone), abs=1e-4)


@pytest.mark.parametrize(
    ("model", "image"), [("smolvlm", "<image>"), pytest.param("qwen", "<|image_pad|>", marks=pytest.mark.slow)]
)
def test_a_mismatched_answer_of_kto_is_to_the_picture_of_its_prompt(folder, tmp_path, model, image):
    tokenizer = load_tokenizer(folder / model)
    pictures = open_picture_encoder(folder / model, tokenizer, tmp_path / "pictures.bin")
    parsed = read_examples(folder / "pairs.jsonl", lambda row: as_labelled_answers(row, pictures=True))
    answers = [one.__class__(one.answered, one.is_desirable, folder) for row in parsed for one in row]
    batch = placed(pack_answers(answers, tokenizer, 512, pictures=pictures).batch, pictures)
    twins = mismatched(batch)
    assert torch.equal((twins.vector_of_token_BT >= 0), twins.tokens_BT == tokenizer.control_id(image))
    found = sorted(float(value) for value in log_probs(folder, model, twins)[twins.per_sequence["is_answer"] > 0])
    others = [answers[place].answered.answer for place in (-1, -1, 1, 1, 3, 3, 5, 5, 7, 7)]
    alone = [
        log_prob_alone(folder, model, one.answered.prompt, other, folder) for one, other in zip(answers, others, strict=True)
    ]
    assert found == pytest.approx(sorted(alone), abs=1e-4)


SETTINGS = {"data": ["colours.jsonl"], "batch_size": 8, "context_length": 128, "learning_rate": 1e-2, "warmup_steps": 0}
SETTINGS |= {"validation_share": 0.25, "dtype": "float32", "compile": False, "diagnostics_every": 0}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Pictures of two colours, each with a pair: what tells the answers apart is in the picture alone."""
    folder = write_colours(tmp_path_factory.mktemp("colours"))
    answers = [("red", "blue") if number % 2 == 0 else ("blue", "red") for number in range(64)]
    write_rows(folder / "colours.jsonl", [pair(f"{number}.png", *two) for number, two in enumerate(answers)])
    return folder


def trained(colours, out, **settings):
    config = PreferenceConfig.parse(SETTINGS | settings, "preference")
    summary = preference(config, colours / "model", out, seed=1, device="cpu", folder=colours)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return summary, [json.loads(line) for line in lines]


@pytest.mark.parametrize("loss", ["sigmoid", pytest.param("kto", marks=pytest.mark.slow)])
def test_a_run_learns_to_prefer_by_what_the_picture_shows(colours, tmp_path, loss):
    summary, records = trained(colours, tmp_path, steps=24, loss=loss, evaluate_every=24)
    held_out = [record["validation_accuracy"] for record in records if "validation_accuracy" in record]
    assert held_out[-1] >= 0.95 and summary["held_out"] >= 8
    if loss == "sigmoid":
        # before the first step the policy is its reference: log 2 a pair
        assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
        assert records[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert not (tmp_path / "pictures.bin").exists()


def test_other_pixels_are_another_reference_and_another_key(colours, tmp_path):
    fingerprint = files_fingerprint(["colours.jsonl"], colours)
    trained(colours, tmp_path / "first", steps=1)
    name = "reference-training.safetensors"
    first = (tmp_path / "first" / name).read_bytes()
    kept = {number: (colours / f"{number}.png").read_bytes() for number in range(0, 64, 2)}
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / name).write_bytes(first)
    try:
        for number in kept:
            (colours / f"{number}.png").write_bytes(encoded(drawn(16, 16, seed=number)))
        assert files_fingerprint(["colours.jsonl"], colours) != fingerprint
        # the tokens are the same, and what an earlier start has left is of other pixels
        trained(colours, tmp_path / "again", steps=1)
    finally:
        for number, before in kept.items():
            (colours / f"{number}.png").write_bytes(before)
    assert (tmp_path / "again" / name).read_bytes() != first


def test_pictures_of_messages_are_part_of_a_stage_s_key(folder, tmp_path):
    content = [{"type": "image_url", "image_url": {"url": "0.png"}}, {"type": "text", "text": "which?"}]
    row = {"prompt": [said("user", content)], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]}
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes())
    write_rows(tmp_path / "parts.jsonl", [row])
    before = files_fingerprint(["parts.jsonl"], tmp_path)
    (tmp_path / "0.png").write_bytes((folder / "1.png").read_bytes())
    assert files_fingerprint(["parts.jsonl"], tmp_path) != before


def test_what_cannot_be_learnt_is_one_line(folder, tmp_path):
    row = pair("0.png", "a", "b")
    with pytest.raises(RequestError, match="pictures are of the user's messages, not of the role 'assistant'"):
        as_pair(row | {"chosen": [said("assistant", [{"type": "image", "image": "0.png"}])]}, pictures=True)
    with pytest.raises(ValueError, match="2 pictures are given, and the messages have 1 places"):
        as_pair(row | {"images": ["0.png", "1.png"]}, pictures=True)
    with pytest.raises(ValueError, match="has images, which are not learnt yet"):
        as_pair(row)
    assert "[picture] which?" in "".join(previewed(str(folder / "pairs.jsonl")).lines())
    write_small_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATES["chatml"], encoding="utf-8")
    pairs, _ = gather_pairs(["pairs.jsonl"], folder, {}, 0.0, 1, pictures=True)
    with pytest.raises(SourceError, match=r"has no place for pictures|has pictures, and this model reads none"):
        pack_pairs(pairs, load_tokenizer(tmp_path), 64)
