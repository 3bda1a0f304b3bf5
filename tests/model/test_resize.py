import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import read_json, write_json
from bessemer.model.stage import extend_model, resize_embeddings
from bessemer.model.storage.folder import load_model, save_model
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.randomised import SHAPES, random_decoder, random_tokens
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("init", ["mean", "subtokens"])
def test_old_ids_keep_their_rows_to_the_bit_and_so_their_logits(config, init):
    model = random_decoder(config)
    tokens_BT = random_tokens(config, 2, 20)
    tables = [model.embed_tokens.weight.clone(), model.head_weight.clone()]
    with torch.no_grad():
        before_BTV = model(tokens_BT)
        resize_embeddings(model, config.vocab_size + 7, init=init, subtokens={config.vocab_size: [1, 2]})
        after_BTV = model(tokens_BT)
    assert after_BTV.shape[-1] == model.config.vocab_size == config.vocab_size + 7
    for old_VD, new_VD in zip(tables, [model.embed_tokens.weight, model.head_weight], strict=True):
        assert torch.equal(new_VD[: config.vocab_size], old_VD)
    # on some processors a product with a larger matrix sums in another order
    torch.testing.assert_close(after_BTV[..., : config.vocab_size], before_BTV, rtol=1e-5, atol=1e-5)
    assert model.head_weight.requires_grad


@pytest.mark.parametrize("shape", ["grouped", "multi-head, untied"])
def test_new_rows_are_the_mean_of_the_old_or_of_what_wrote_the_token_before(shape):
    model = random_decoder(SHAPES[shape])
    tables = [model.embed_tokens.weight.clone(), model.head_weight.clone()]
    size = model.config.vocab_size
    resize_embeddings(model, size + 2, init="subtokens", subtokens={size: [5, 6, 6]})
    for old_VD, new_VD in zip(tables, [model.embed_tokens.weight, model.head_weight], strict=True):
        torch.testing.assert_close(new_VD[size], (old_VD[5] + 2 * old_VD[6]) / 3)
        torch.testing.assert_close(new_VD[size + 1], old_VD.mean(0))


def test_a_new_token_of_mean_rows_takes_little_from_the_others():
    model = random_decoder(SHAPES["multi-head, untied"])
    tokens_BT = random_tokens(model.config, 4, 30)
    size = model.config.vocab_size
    with torch.no_grad():
        before_BTV = model(tokens_BT).log_softmax(-1)
        after_BTV = resize_embeddings(model, size + 1)(tokens_BT).log_softmax(-1)
    lost_BTV = before_BTV - after_BTV[..., :size]
    assert 0 < lost_BTV.max() <= torch.log(torch.tensor(1 + 1 / size)) + 1e-5  # Jensen: exp(mean) <= mean(exp)


def test_a_vocabulary_does_not_shrink():
    with pytest.raises(ConfigError, match="cannot shrink from 199 to 198 tokens"):
        resize_embeddings(random_decoder(SHAPES["grouped"]), 198)


def model_folder(folder, tied=True, vocab_size=VOCAB_SIZE):
    config = SHAPES["grouped"].model_copy(
        update={"vocab_size": vocab_size, "tie_word_embeddings": tied, "bos_token_id": 260, "eos_token_id": 260}
    )
    write_small_tokenizer(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": [260, 262]})
    save_model(random_decoder(config), folder, tokenizer=folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_an_extended_model_is_one_folder_that_fits_together_and_transformers_opens(tied, tmp_path):
    source, out = model_folder(tmp_path / "model", tied), tmp_path / "extended"
    extension = extend_model(source, out, ["<tool>", "the"], ["<|call|>"])
    assert extension.added == {263: "<tool>", 264: "<|call|>"} and extension.skipped == {"the": 257}
    config = read_json(out / "config.json")
    assert config["vocab_size"] == 265 and config["bessemer"]["tokenizer_hash"] == hash_file(out / "tokenizer.json")
    assert read_json(out / "generation_config.json") == read_json(source / "generation_config.json")
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    tokens_BT = torch.tensor([tokenizer("use the <tool> in it").input_ids])
    assert 263 in tokens_BT and tokens_BT.tolist() == [load_tokenizer(out).encode("use the <tool> in it")]
    with torch.no_grad():
        logits_BTV = load_model(out)(tokens_BT)
        assert (logits_BTV - theirs(tokens_BT).logits).abs().max() <= 1e-4
        old_BT = tokens_BT[:, :4]
        torch.testing.assert_close(load_model(out)(old_BT)[..., :263], load_model(source)(old_BT), rtol=1e-5, atol=1e-5)


def test_padding_rows_of_a_longer_table_are_used_first(tmp_path):
    source, out = model_folder(tmp_path / "model", vocab_size=264), tmp_path / "extended"
    old_VD = load_model(source).embed_tokens.weight
    extend_model(source, out, ["<tool>"])
    new_VD = load_model(out).embed_tokens.weight
    assert new_VD.shape == old_VD.shape and torch.equal(new_VD[:263], old_VD[:263])
    torch.testing.assert_close(new_VD[263], old_VD[:263].mean(0))


def test_a_model_is_extended_into_a_new_folder_only(tmp_path):
    source = model_folder(tmp_path / "model")
    with pytest.raises(ArtefactError, match="exists already and is not empty"):
        extend_model(source, source, ["<tool>"])
