"""Training with pictures: what a batch holds, which weights change, and a run that is cut off."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from bessemer.core.errors import ConfigError, SourceError
from bessemer.model.config import ModelConfig
from bessemer.model.storage.folder import load_model, save_initial_model
from bessemer.model.vision.assemble import build_vision_model
from bessemer.model.vision.encoder import Pixels
from bessemer.model.vision.folder import load_vision_language, read_vision_language, save_vision_encoder
from bessemer.model.vision.stage_config import VisionStageConfig
from bessemer.model.vision.trained import VisionDecoder, load_trained_decoder
from bessemer.posttraining.data.examples import read_conversations
from bessemer.posttraining.data.packing import encode_conversation, pack_conversations
from bessemer.posttraining.data.picture_encoding import open_picture_encoder, picture_of
from bessemer.posttraining.data.picture_rows import sources_in
from bessemer.posttraining.sft.config import SFTConfig
from bessemer.posttraining.sft.stage import sft
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.objectives import next_token_loss
from tests.cases import slow_but
from tests.model.picture_files import drawn, encoded, write_gemma3_model, write_picture_model, write_qwen_model
from tests.model.tokenizers import write_small_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SmolVLM, and rows: four with a picture each, one with two, one without."""
    return write_rows(tmp_path_factory.mktemp("pictures"), write_picture_model)


def write_rows(folder, write_model):
    folder.mkdir(exist_ok=True)
    write_model(folder / "model")
    rows = []
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(drawn(40 if number else 16, 30 if number else 16, seed=number)))
        rows.append(asked(number, f"number {number}"))
    rows += [asked(0, "both", 1), {"messages": [said("user", "who?"), said("assistant", "me")]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def said(role, content):
    return {"role": role, "content": content}


def asked(first, answer, *others):
    parts = [{"type": "image_url", "image_url": {"url": f"{number}.png"}} for number in (first, *others)]
    return {"messages": [said("user", [*parts, {"type": "text", "text": "which?"}]), said("assistant", answer)]}


@pytest.fixture
def packed(folder, tmp_path):
    return packed_rows(folder, tmp_path)


def packed_rows(folder, tmp_path):
    tokenizer = load_tokenizer(folder / "model")
    pictures = open_picture_encoder(folder / "model", tokenizer, tmp_path / "pictures.bin")
    conversations = read_conversations(folder / "rows.jsonl")
    batch = pictures.placed(pack_conversations(conversations, tokenizer, 256, pictures=pictures).batch)
    return conversations, tokenizer, pictures, batch


def test_a_picture_has_its_tokens_none_of_which_is_learnt(packed):
    _, tokenizer, _, batch = packed
    image, is_picture_BT = tokenizer.control_id("<image>"), batch.vector_of_token_BT >= 0
    assert torch.equal(is_picture_BT, batch.tokens_BT == image)
    # 4 · 4 tiles and the whole of the square picture, 4 · 3 and the whole of the others; the first two stand twice
    assert int(is_picture_BT.sum()) == 4 * (2 * 17 + 4 * 13)
    assert batch.pictures.tiles.shape == (17 + 3 * 13, 16, 16, 3)
    assert not (batch.targets_BT[is_picture_BT] != IGNORE_INDEX).any()
    learnt = tokenizer.decode(batch.targets_BT[batch.targets_BT != IGNORE_INDEX].tolist())
    assert all(f"number {number}" in learnt for number in range(4)) and "which" not in learnt


def test_packed_conversations_are_learnt_as_each_alone(folder, packed):
    check_packed(folder, packed)


def test_pictures_whose_tokens_see_each_other_are_learnt_as_each_alone(tmp_path):
    """Gemma 3's; the mask holds them within packed rows."""
    folder = write_rows(tmp_path / "rows", write_gemma3_model)
    packed = packed_rows(folder, tmp_path)
    assert int((packed[3].vector_of_token_BT >= 0).sum()) == 6 * 16
    check_packed(folder, packed)
    test_gradients_reach_the_encoder_and_the_projector(folder, packed)


def test_pictures_in_shapes_of_their_own_are_learnt_as_each_alone(tmp_path):
    """Qwen2.5-VL's, whose positions begin anew in each conversation, and go on from the larger side of a picture."""
    folder = write_rows(tmp_path / "rows", write_qwen_model)
    packed = packed_rows(folder, tmp_path)
    batch = packed[3]
    # 2 · 2 tokens of the square picture, 5 · 4 of the others; the first two stand twice
    assert int((batch.vector_of_token_BT >= 0).sum()) == 2 * 4 + 4 * 20
    assert not torch.equal(batch.rope_BT3[..., 1], batch.rope_BT3[..., 2])
    check_packed(folder, packed)
    test_gradients_reach_the_encoder_and_the_projector(folder, packed)
    # places as positions give another loss
    model = load_trained_decoder(folder / "model").eval()
    placed = replace(batch, rope_BT3=batch.positions_BT[..., None].expand(-1, -1, 3))
    assert abs(float(next_token_loss(model, placed)) - float(next_token_loss(model, batch))) > 1e-3


@torch.no_grad()
def check_packed(folder, packed):
    conversations, tokenizer, pictures, batch = packed
    assert (batch.document_ids_BT.max(1).values > 1).any()
    model = load_trained_decoder(folder / "model").eval()
    alone, reader, whole = [], pictures.reader, load_vision_language(folder / "model")
    for one in conversations:
        (encoded_one,) = encode_conversation(one, tokenizer)
        shown = [picture_of(source, one.folder) for source in sources_in(one.messages)]
        prompt = reader.expand(encoded_one.ids.tolist(), shown)
        tiles = [reader.preprocessor.pixels(span.prepared) for span in prompt.spans]
        pixels = Pixels(*(None if part[0] is None else torch.cat(part) for part in zip(*tiles, strict=True))) if tiles else None
        logits = whole(torch.tensor([prompt.ids]), pixels)[0].log_softmax(-1)
        count = int(encoded_one.is_learnt.sum())
        last = int(np.flatnonzero(encoded_one.is_learnt)[-1]) - len(encoded_one.ids) + len(prompt.ids)
        places = range(last - count + 1, last + 1)
        alone += [-float(logits[place - 1, prompt.ids[place]]) for place in places]
    assert float(next_token_loss(model, batch)) == pytest.approx(sum(alone) / len(alone), abs=1e-4)
    # and of some rows, in which not all pictures are
    of_rows = [batch.rows(slice(row, row + 1)).inputs["pictures"].pixels.values for row in range(len(batch.tokens_BT))]
    assert min(map(len, of_rows)) < len(batch.inputs["pictures"].pixels.values)


def test_gradients_reach_the_encoder_and_the_projector(folder, packed):
    model = load_trained_decoder(folder / "model").train()
    next_token_loss(model, packed[3]).backward()
    assert isinstance(model, VisionDecoder)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.vision.parameters())


SETTINGS = {"data": ["rows.jsonl"], "batch_size": 2, "context_length": 256, "steps": 4, "learning_rate": 1e-2}
SETTINGS |= {"validation_share": 0, "dtype": "float32", "compile": False, "checkpoint_every": 2, "diagnostics_every": 0}
#: LLaVA's first stage.
PROJECTOR_ALONE = ["embed_tokens.*", "layers.*", "norm.*", "lm_head.*", "vision.encoder.*"]


def trained(folder, out, **settings):
    sft(SFTConfig.parse(SETTINGS | settings, "sft"), folder / "model", None, out, seed=1, device="cpu", folder=folder)
    return weights_of(out / "model")


def weights_of(folder):
    return load_trained_decoder(folder).state_dict()


def test_stage_one_trains_the_projector_alone(folder, tmp_path):
    before, after = weights_of(folder / "model"), trained(folder, tmp_path, freeze=PROJECTOR_ALONE)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"vision.projector.proj.weight"}
    assert (tmp_path / "model" / "preprocessor_config.json").is_file() and not (tmp_path / "pictures.bin").exists()


#: Of Qwen2.5-VL's, at a small rate: with the other tests' the tiny model's logits grow without bound.
STAGES = {
    "projector": {"freeze": [name for name in PROJECTOR_ALONE if name != "lm_head.*"], "learning_rate": 1e-3},
    "language model": {"freeze": ["vision.*"], "learning_rate": 1e-3},
    "all": {"learning_rate": 1e-3},
}


@pytest.mark.parametrize("stage", slow_but(["all"], STAGES))
def test_what_is_written_after_training_is_read_by_transformers_alike(tmp_path, stage):
    folder = write_rows(tmp_path / "rows", write_qwen_model)
    before, after = weights_of(folder / "model"), trained(folder, tmp_path / "out", **STAGES[stage])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("vision.projector") for name in changed) == (stage != "language model")
    assert any(name.startswith("vision.encoder") for name in changed) == (stage == "all")
    assert any(name.startswith("layers.") for name in changed) == (stage != "projector")
    written = tmp_path / "out" / "model"
    theirs, loading = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(written, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ours, image = load_vision_language(written), read_vision_language(written).image_token_id
    tokens = torch.tensor([[7, 8, *[image] * 6, 9, 10, 11]])
    pixels = Pixels(torch.randn(24, 96, generator=torch.Generator().manual_seed(1)), shapes=torch.tensor([[4, 6]]))
    grid, types = torch.tensor([[1, 4, 6]]), (tokens == image).int()
    with torch.no_grad():
        expected = theirs.eval()(tokens, pixel_values=pixels.values, image_grid_thw=grid, mm_token_type_ids=types).logits
        assert expected.std() > 0.2
        assert (ours(tokens, pixels) - expected).abs().max() < 1e-4


def test_stage_two_with_an_adapter_is_merged_and_leaves_the_encoder(folder, tmp_path):
    before, after = weights_of(folder / "model"), trained(folder, tmp_path, adapter={"rank": 2, "merge": True})
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("layers.") for name in changed)
    with pytest.raises(ConfigError, match="written with its adapter merged"):
        trained(folder, tmp_path / "apart", adapter={"rank": 2, "merge": False})


# by default the adapter of a model of texts alone goes on bit for bit
@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_with_the_same_weights(folder, tmp_path):
    whole = trained(folder, tmp_path)
    for name in ("model", "checkpoints/step-000004", "metrics.jsonl"):
        place = tmp_path / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    again = trained(folder, tmp_path)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_other_pictures_are_another_run(folder, tmp_path, packed):
    batch = packed[3]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "1.png").write_bytes(encoded(drawn(40, 30, seed=9)))
    tokenizer = load_tokenizer(other / "model")
    pictures = open_picture_encoder(other / "model", tokenizer, tmp_path / "others.bin")
    changed = pictures.placed(
        pack_conversations(read_conversations(other / "rows.jsonl"), tokenizer, 256, pictures=pictures).batch
    )
    assert torch.equal(changed.tokens_BT, batch.tokens_BT)
    assert changed.pictures.fingerprint != batch.pictures.fingerprint


def test_what_cannot_be_trained_is_one_line(folder, tmp_path):
    (folder / "missing.jsonl").write_text(json.dumps(asked(7, "nothing")) + "\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"cannot be written by the model's chat template.*7\.png cannot be read"):
        trained(folder, tmp_path, data=["missing.jsonl"])
    write_small_tokenizer(tmp_path / "text")
    (tmp_path / "text" / "chat_template.jinja").write_text(CHAT_TEMPLATES["chatml"], encoding="utf-8")
    text = load_tokenizer(tmp_path / "text")
    with pytest.raises(SourceError, match=r"has no place for pictures|has pictures, and this model reads none"):
        pack_conversations(read_conversations(folder / "missing.jsonl"), text, 64)


def language_model(folder):
    (folder / "tokens").mkdir(parents=True)
    write_small_tokenizer(folder / "tokens")
    (folder / "tokens" / "chat_template.jinja").write_text(CHAT_TEMPLATES["chatml"], encoding="utf-8")
    size = load_tokenizer(folder / "tokens").vocab_size
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig(vocab_size=size, num_key_value_heads=2, head_dim=16, max_position_embeddings=128, **sizes)
    save_initial_model(config, 1, folder / "text", tokenizer=folder / "tokens")
    return folder / "text"


@torch.no_grad()
@pytest.mark.parametrize("projector", ["pixel_shuffle", "mlp"])
def test_a_language_model_gets_eyes_and_keeps_its_words(tmp_path, projector):
    text = language_model(tmp_path)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = VisionStageConfig.parse({"projector": projector, **sizes}, "vision")
    figures = build_vision_model(config, text, tmp_path / "out", seed=1)
    assert figures["tokens_per_tile"] == (4 if projector == "pixel_shuffle" else 16)
    model, before = load_trained_decoder(tmp_path / "out" / "model"), load_model(text)
    tokenizer = load_tokenizer(tmp_path / "out" / "model")
    tokens = torch.tensor([load_tokenizer(text).encode("what is it?")])
    assert torch.equal(tokens, torch.tensor([tokenizer.encode("what is it?")]))
    size = before.config.vocab_size
    torch.testing.assert_close(model(tokens)[..., :size], before(tokens), rtol=0, atol=1e-6)
    content = [{"type": "image"}, {"type": "text", "text": "an <image>?"}]
    ids = tokenizer.apply_chat_template([said("user", content)], add_generation_prompt=True)
    assert ids.count(tokenizer.control_id("<image>")) == 1
    # an encoder that is given keeps its weights
    if projector == "mlp":
        save_vision_encoder(model.vision.encoder, tmp_path / "encoder")
        again = VisionStageConfig.parse({"projector": projector, "encoder": "encoder"}, "vision")
        build_vision_model(again, text, tmp_path / "second", seed=2, folder=tmp_path)
        second = load_trained_decoder(tmp_path / "second" / "model")
        own, other = (one.vision.encoder.state_dict() for one in (model, second))
        assert all(torch.equal(own[name], other[name]) for name in own)
