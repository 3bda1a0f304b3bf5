import pytest
import torch

from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.objectives import mtp_targets
from tests.model.family_models import make
from tests.model.randomised import random_decoder

CONFIG = ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=40, num_nextn_predict_layers=2)


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(CONFIG)


@torch.no_grad()
def test_mtp_module_k_sees_the_token_k_further_and_none_beyond(decoder):
    tokens_BT = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(1))
    _, before = decoder.hidden_and_mtp(tokens_BT)
    for changed in range(3, 12):
        other_BT = tokens_BT.clone()
        other_BT[0, changed] = (other_BT[0, changed] + 1) % 50
        _, after = decoder.hidden_and_mtp(other_BT)
        for step, (one, other) in enumerate(zip(before, after, strict=True), start=1):
            moved = (one - other).abs().amax(-1)[0] > 1e-6
            assert not moved[: changed - step].any()
            assert moved[changed - step]


@torch.no_grad()
def test_hidden_states_do_not_depend_on_mtp_modules(decoder):
    tokens_BT = torch.randint(0, 50, (2, 9))
    assert torch.equal(decoder.hidden_and_mtp(tokens_BT)[0], decoder.hidden(tokens_BT))


def test_targets_ahead_end_with_their_document():
    targets_BT = torch.tensor([[1, 2, 3, 4, 5]])
    assert mtp_targets(targets_BT, None, 2).tolist() == [[3, 4, 5, IGNORE_INDEX, IGNORE_INDEX]]
    documents_BT = torch.tensor([[0, 0, 0, 1, 1]])
    assert mtp_targets(targets_BT, documents_BT, 1).tolist() == [[2, 3, IGNORE_INDEX, 5, IGNORE_INDEX]]


def test_parameters_are_counted(decoder):
    assert CONFIG.parameters() == sum(parameter.numel() for parameter in decoder.parameters())


def test_deepseek_files_hold_the_mtp_modules_after_the_last_layer(tmp_path):
    make("deepseek_v3").save_pretrained(tmp_path / "theirs")
    config = load_model(tmp_path / "theirs").config.with_changes(num_nextn_predict_layers=1)
    ours = initial_decoder(config, seed=1)
    save_model(ours, tmp_path / "ours", tokenizer=None)
    back = load_model(tmp_path / "ours")
    assert back.config == config
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())
    names = (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert b"model.layers.4.eh_proj.weight" in names and b"model.layers.4.shared_head.norm.weight" in names
