"""What supervised tuning adds to next-token prediction: text among conversations, DFT, NEFTune, answers alone."""

import json

import numpy as np
import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.data.examples import Conversation
from bessemer.posttraining.data.formats import Answered
from bessemer.posttraining.data.packing import PackedBatches, encode_conversation, pack_conversations
from bessemer.posttraining.sft.config import SFTConfig
from bessemer.posttraining.sft.stage import MixedBatches, add_embedding_noise, dynamic_fine_tuning, sft
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.data.batches import TokenBatches
from bessemer.training.objectives import token_losses
from bessemer.training.pretrain import pretrain
from bessemer.training.pretrain_config import PretrainConfig
from tests.posttraining.test_formats import said

pytestmark = pytest.mark.usefixtures("one_thread")


def test_of_a_prompt_and_a_completion_the_completion_is_learnt(tokenizer):
    prompt = (said("user", "One?"), said("assistant", "1."), said("user", "Two?"))
    asked = Conversation(Answered(prompt, (said("assistant", "2."),)), "test")
    _, targets = encode_conversation(asked, tokenizer)[0].example(200)
    learnt = targets[targets != IGNORE_INDEX]
    assert tokenizer.decode(learnt.tolist(), skip_special=False) == "2.<|im_end|>"
    _, targets = encode_conversation(Conversation(Answered("One and one is", " two."), "test"), tokenizer)[0].example(200)
    learnt = targets[targets != IGNORE_INDEX]
    assert tokenizer.decode(learnt.tolist(), skip_special=False) == " two.<|endoftext|>"


def test_a_share_of_the_rows_is_text_and_each_source_is_read_in_its_own_order(tokenizer, tokenized):
    talk = [Conversation.of([said("user", str(n)), said("assistant", "word " * n)], "test") for n in range(1, 14)]
    packed = pack_conversations(talk, tokenizer, 32).batch
    shards = TokenShards(tokenized / "tokens" / "train")
    text = TokenBatches(shards, batch_size=1, context_length=32, seed=5)
    alone = PackedBatches(packed, batch_size=1, seed=3)
    mixed = MixedBatches(alone, text, 0.3, batch_size=4)
    rows = [mixed.batch(step).rows(slice(row, row + 1)) for step in range(10) for row in range(4)]
    is_text = [bool((row.targets_BT != IGNORE_INDEX).all()) for row in rows]
    assert sum(is_text) == 12
    orders = {True: iter(range(12)), False: iter(range(28))}
    for row, of_text in zip(rows, is_text, strict=True):
        expected = (text if of_text else alone).batch(next(orders[of_text]))
        assert torch.equal(row.tokens_BT, expected.tokens_BT) and torch.equal(row.targets_BT, expected.targets_BT)
    whole, parts = mixed.batch(2), [mixed.batch(2, slice(0, 1)), mixed.batch(2, slice(1, 4))]
    assert torch.equal(whole.document_ids_BT, torch.cat([part.document_ids_BT for part in parts]))


def test_text_among_conversations_holds_the_loss_on_text(model_folder, tokenized, tmp_path):
    loop = {"batch_size": 8, "context_length": 64, "dtype": "float32", "compile": False, "diagnostics_every": 0}
    loop |= {"threads": 1, "evaluate_every": 1000, "learning_rate": 1e-2}
    (tmp_path / "pretrained").mkdir()
    config = PretrainConfig(steps=60, sample_points=0, evaluate_tokens=64, **loop)
    pretrain(config, model_folder, tokenized / "tokens", tmp_path / "pretrained", seed=1, device="cpu")
    chat = tmp_path / "chat.jsonl"
    rows = [{"messages": [said("user", f"{n} + 1?"), said("assistant", f"It is {n + 1}.")]} for n in range(60)]
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    held_out = TokenBatches(TokenShards(tokenized / "tokens" / "validation"), batch_size=16, context_length=64, seed=0).batch(0)

    def text_loss(folder):
        return token_losses(load_model(folder / "model"), held_out).mean().item()

    losses = {"pretrained": text_loss(tmp_path / "pretrained")}
    for share in (0.0, 0.25):
        out = tmp_path / f"sft-{share}"
        out.mkdir()
        config = SFTConfig(data=[str(chat)], pretraining_share=share, steps=30, **loop)
        sft(config, tmp_path / "pretrained" / "model", None, out, tokens=tokenized / "tokens", seed=1, device="cpu")
        losses[share] = text_loss(out)
    assert losses[0.0] > 1.2 * losses["pretrained"] and losses[0.25] < 1.05 * losses["pretrained"], losses


def test_dft_has_the_gradient_of_the_probability(model_folder, tokenizer):
    model = load_model(model_folder).train()
    batch = pack_conversations([Conversation.of([said("user", "a"), said("assistant", "b c d")], "t")], tokenizer, 64).batch
    hidden = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, document_ids_BT=batch.document_ids_BT)
    loss = dynamic_fine_tuning(model, hidden, batch.targets_BT, 0.0)
    found = torch.autograd.grad(loss, model.norm.weight, retain_graph=True)[0]
    places = (batch.targets_BT != IGNORE_INDEX).nonzero().T.tolist()
    probabilities = model.logits(hidden).softmax(-1)[places[0], places[1], batch.targets_BT[places[0], places[1]]]
    torch.testing.assert_close(loss, -(probabilities * probabilities.log()).sum())
    torch.testing.assert_close(found, torch.autograd.grad(-probabilities.sum(), model.norm.weight)[0], rtol=1e-4, atol=1e-6)


def test_neftune_adds_bounded_noise_to_embeddings_in_training_alone(model_folder):
    model = load_model(model_folder)
    tokens_BT = torch.arange(50).view(2, 25)
    before = model.embed_tokens(tokens_BT)
    add_embedding_noise(model, 5.0)
    assert torch.equal(model.embed_tokens(tokens_BT), before)
    model.train()
    noise = (model.embed_tokens(tokens_BT) - before).detach().numpy()
    bound = 5.0 / np.sqrt(25 * 32)
    assert np.abs(noise).max() <= bound * 1.0001
    assert noise.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)


def test_settings_that_do_not_go_together_are_told():
    with pytest.raises(ConfigError, match="prompt_column and answer_column go together"):
        SFTConfig.parse({"data": ["a.csv"], "prompt_column": "question"})
    with pytest.raises(ConfigError, match="z_loss: beside cross_entropy"):
        SFTConfig.parse({"data": ["a.csv"], "loss": "dft", "z_loss": 1e-4})
