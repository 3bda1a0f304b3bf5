import math
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bessemer.model.families import FAMILIES, family_of
from bessemer.model.families.layout import TensorBox
from bessemer.model.initialisation import tensor_shapes
from bessemer.model.layers.cache import DecoderCache
from bessemer.model.storage.folder import load_model, save_model
from bessemer.model.storage.model_config import read_model_config
from bessemer.model.storage.weights import find_tensors, read_boxes
from tests.cases import slow_but
from tests.model.family_models import CASES, EVERY_FAMILY, LONGROPE, OF_EACH_KIND, make

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=sorted(CASES))
def pair(request, tmp_path_factory):
    """A `transformers` model, and ours loaded from its folder."""
    theirs = make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), folder


def tokens(rows, length, seed=3):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_equal_those_of_transformers(pair):
    theirs, ours, _ = pair
    tokens_BT = tokens(2, 20)
    expected = theirs(tokens_BT).logits
    assert 0.3 < expected.std() < 4
    assert (ours(tokens_BT) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("pair", slow_but(EVERY_FAMILY, sorted(CASES)), indirect=True)
@torch.no_grad()
def test_cached_decoding_equals_that_of_transformers(pair):
    theirs, ours, _ = pair
    tokens_BT = tokens(2, 20)
    cache, past = DecoderCache(ours.config, 2, 20), None
    for piece in tokens_BT.split([7, 1, 11, 1], dim=1):
        expected = theirs(piece, past_key_values=past, use_cache=True)
        past = expected.past_key_values
        assert (ours(piece, cache=cache) - expected.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("pair", slow_but([*OF_EACH_KIND, "qwen3_next"], sorted(CASES)), indirect=True)
@torch.no_grad()
def test_left_padding_changes_nothing(pair):
    """As a batch for `transformers` is padded; ours sees the padding as another document."""
    theirs, ours, _ = pair
    tokens_BT, padding = tokens(2, 11), torch.tensor([0, 5])
    real_BT = torch.arange(11) >= padding[:, None]
    positions_BT = (torch.arange(11) - padding[:, None]).clamp(min=0)
    logits = ours(tokens_BT, positions_BT=positions_BT, document_ids_BT=real_BT.long())
    assert (logits[1, 5:] - ours(tokens_BT[1:, 5:])[0]).abs().max() < TOLERANCE
    expected = theirs(tokens_BT, attention_mask=real_BT.long(), position_ids=positions_BT).logits
    assert (logits - expected)[real_BT].abs().max() < TOLERANCE


@pytest.mark.parametrize("pair", slow_but([*OF_EACH_KIND, "qwen3_next"], sorted(CASES)), indirect=True)
@torch.no_grad()
def test_packed_documents_equal_each_alone(pair):
    _, ours, _ = pair
    documents = [tokens(1, length, seed=length) for length in (7, 3, 10)]
    ids_BT = torch.cat([torch.full((1, document.shape[1]), index) for index, document in enumerate(documents)], dim=1)
    positions_BT = torch.cat([torch.arange(document.shape[1])[None] for document in documents], dim=1)
    packed = ours(torch.cat(documents, dim=1), positions_BT=positions_BT, document_ids_BT=ids_BT)
    alone = torch.cat([ours(document) for document in documents], dim=1)
    assert (packed - alone).abs().max() < TOLERANCE


@pytest.mark.parametrize("pair", slow_but([*OF_EACH_KIND, "qwen3_next"], sorted(CASES)), indirect=True)
@torch.no_grad()
def test_rows_of_different_lengths_decode_as_each_alone(pair):
    _, ours, _ = pair
    rows, lengths = tokens(2, 12), [4, 9]
    cache = DecoderCache(ours.config, 2, 12)
    ours.hidden(rows[:, :9], cache=cache, real=lengths)
    cache.shorten(lengths)
    steps = torch.stack([rows[0, 4:7], rows[1, 9:12]])
    for step in range(3):
        logits = ours(steps[:, step : step + 1], cache=cache)
        for row, length in enumerate(lengths):
            expected = ours(rows[row : row + 1, : length + step + 1])[0, -1]
            assert (logits[row, 0] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("pair", slow_but(OF_EACH_KIND, sorted(CASES)), indirect=True)
def test_gradients_equal_those_of_transformers(pair, tmp_path):
    """Compared in the form of the files, where both call their tensors alike."""
    theirs, ours, _ = pair
    tokens_BT = tokens(2, 11)
    weights = torch.randn(2, 11, 97, generator=torch.Generator().manual_seed(5))
    with torch.enable_grad():
        for model in (theirs, ours):
            model.zero_grad()
            output = model(tokens_BT)
            ((output if torch.is_tensor(output) else output.logits) * weights).mean().backward()
    expected = stored_gradients(theirs, tmp_path)
    family, gradients = family_of(ours.config), {name: value.grad for name, value in ours.named_parameters()}
    compared = 0
    for stored in family.stored(ours.config, [name for name in tensor_shapes(ours.config) if name in gradients]):
        ours_grad, theirs_grad = stored.pack(gradients), expected[stored.name]
        assert (ours_grad - theirs_grad).norm() <= 1e-4 * theirs_grad.norm() + 1e-9, stored.name
        compared += 1
    assert compared >= len(gradients) / 3


def stored_gradients(model, folder):
    """The gradients of a `transformers` model as it would save them."""
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.grad)
        model.save_pretrained(folder)
        for name, value in model.named_parameters():
            value.copy_(kept[name])
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("pair", slow_but(OF_EACH_KIND, sorted(CASES)), indirect=True)
@torch.no_grad()
def test_corrupting_any_tensor_changes_the_logits(pair):
    _, ours, _ = pair
    tokens_BT = tokens(2, 20)
    before = ours(tokens_BT)
    for name, tensor in ours.state_dict().items():
        if name.endswith("k_proj.bias") and ours.config.position_type != "rotary":
            continue  # adds the same to all scores of a query: the softmax does not see it
        kept = tensor.clone()
        tensor.copy_(tensor.flatten().roll(1).view(tensor.shape) + 0.05)
        assert (ours(tokens_BT) - before).abs().max() > TOLERANCE, name
        tensor.copy_(kept)


@pytest.mark.parametrize("pair", slow_but(EVERY_FAMILY, sorted(CASES)), indirect=True)
def test_a_round_trip_through_transformers_changes_nothing(pair, tmp_path):
    _, ours, _ = pair
    save_model(ours, tmp_path / "ours", tokenizer=None)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    reloaded.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    assert back.config == ours.config
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("pair", slow_but(EVERY_FAMILY, sorted(CASES)), indirect=True)
def test_our_folder_opens_in_transformers_with_the_same_logits(pair, tmp_path):
    _, ours, _ = pair
    save_model(ours, tmp_path, tokenizer=None)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert (reloaded(tokens(2, 20)).logits - ours(tokens(2, 20))).abs().max() < TOLERANCE


def test_parameters_and_cache_are_counted_without_building_the_model(pair):
    _, ours, _ = pair
    assert ours.config.parameters() == sum(parameter.numel() for parameter in ours.parameters())
    cache = DecoderCache(ours.config, batch_size=3, capacity=7)
    assert cache.nbytes == 3 * 7 * ours.config.kv_bytes_per_token(4)


def test_longrope_in_a_context_beyond_the_old_one_is_that_of_transformers(tmp_path):
    model = make("phi3-longrope-short", rope_parameters=dict(LONGROPE), original_max_position_embeddings=4)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    scaling = ours.config.rope_scaling
    assert scaling.rope_type == "longrope"
    assert scaling.attention_factor == pytest.approx((1 + math.log(16) / math.log(4)) ** 0.5)
    # more than the old context, so that transformers too takes the long factors
    with torch.no_grad():
        assert (model(tokens(2, 20)).logits - ours(tokens(2, 20))).abs().max() < TOLERANCE


def test_every_family_is_tested():
    tested = {case.split("-")[0].replace("gemma3", "gemma3_text") for case in CASES}
    assert tested == set(FAMILIES) - {"bessemer"}


def test_any_part_of_a_tensor_is_read_alone(pair):
    _, ours, folder = pair
    stored, draw, parts = find_tensors(folder, read_model_config(folder)), random.Random(5), {}
    for name, tensor in ours.state_dict().items():
        for _ in range(3):
            edges = [sorted(draw.sample(range(size + 1), 2)) for size in tensor.shape]
            memory = torch.full([stop - start for start, stop in edges], torch.nan)
            parts.setdefault(name, []).append(TensorBox(memory, tuple(start for start, _ in edges)))
    read_boxes(stored, parts)
    for name, tensor in ours.state_dict().items():
        for part in parts[name]:
            assert torch.equal(part.tensor, tensor[part.box]), (name, part.box)


@torch.no_grad()
def test_llama_4_has_a_context_in_which_chunks_and_temperatures_do_not_count(tmp_path):
    changed = {"attention_chunk_size": 16, "floor_scale": 12, "attn_scale": 4.0}
    theirs, tokens_BT = make("llama4_text", **changed), tokens(2, 12)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (ours(tokens_BT[:, :11]) - theirs(tokens_BT[:, :11]).logits).abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="12 tokens exceed the model's max_position_embeddings of 11"):
        ours(tokens_BT)
    # the next token is the first whose queries are warmer
    even = make("llama4_text", **changed, attn_temperature_tuning=False)
    apart = (even(tokens_BT).logits - theirs(tokens_BT).logits).abs().amax((0, 2))
    assert apart[:11].max() < TOLERANCE < apart[11]
