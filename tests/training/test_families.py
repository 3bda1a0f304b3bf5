"""Every architecture learns in the real loop: the loss falls, and no tensor is left out."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from bessemer.core.metrics import read_metrics
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.families import FAMILIES, read_config
from bessemer.model.initialisation import initial_decoder
from bessemer.training.data.batch import Batch
from bessemer.training.data.batches import StatelessBatches
from bessemer.training.loop import train
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from tests.model.family_models import CASES, make

STEPS, VOCAB_SIZE, LENGTH = 30, 97, 24


class Counting(StatelessBatches):
    """Rows that go on by a fixed step from token to token, so that the next one can be known."""

    fingerprint, batch_size = "counting", 4

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        draw = torch.Generator().manual_seed(step)
        starts_B1 = torch.randint(0, VOCAB_SIZE, (self.batch_size, 1), generator=draw)
        rows_BT = (starts_B1 + 5 * torch.arange(LENGTH + 1)) % VOCAB_SIZE
        return Batch(rows_BT[rows, :-1], rows_BT[rows, 1:])


def losses_of(config: ModelConfig, out: Path, **settings) -> tuple[list[float], list[str]]:
    """The losses of a short training, and the names of the tensors that it did not move: nothing decays."""
    loop = PretrainConfig(
        steps=STEPS,
        batch_size=4,
        context_length=LENGTH,
        learning_rate=0.01,
        weight_decay=0.0,
        dtype="float32",
        compile=False,
        threads=1,
    ).with_changes(**settings)
    model = initial_decoder(config, seed=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, Counting(), loop, out, runtime=Runtime.of(loop, torch.device("cpu")), seed=1)
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl")], unmoved


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES))
def test_every_family_learns_and_every_tensor_moves(case, tmp_path):
    make(case).save_pretrained(tmp_path / "theirs")
    values = AutoConfig.from_pretrained(tmp_path / "theirs").to_dict()
    config = read_config(FAMILIES[values["model_type"]], values)
    losses, unmoved = losses_of(config, tmp_path)
    assert losses[-1] < losses[0] - 1
    assert unmoved == []


SMALL = ModelConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, head_dim=16, intermediate_size=48)
CHANGED = {
    "experts": {"num_experts": 4, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001},
    "hybrid": {"layer_types": ("linear_attention", "full_attention"), "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "latent, multi-token": {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_nextn_predict_layers": 1,
    },
    # as wide as the sines that are added to them, which else drown the embedding (Vaswani et al. 2017, section 3.4)
    "sinusoidal": {"position_type": "sinusoidal", "embedding_multiplier": 32**0.5, "initializer_range": 32**-0.5},
    "alibi": {"position_type": "alibi"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_what_no_family_of_ours_has_learns_too(name, tmp_path):
    losses, unmoved = losses_of(SMALL.with_changes(**CHANGED[name]), tmp_path)
    assert losses[-1] < losses[0] - 1
    assert unmoved == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experts", "hybrid"])
def test_compiled_blocks_in_bfloat16_learn_as_eager_ones_in_float32(name, tmp_path):
    config = SMALL.with_changes(**CHANGED[name])
    eager, _ = losses_of(config, tmp_path / "eager")
    compiled, unmoved = losses_of(config, tmp_path / "compiled", dtype="bfloat16", compile=True)
    assert unmoved == []
    assert compiled[-1] < compiled[0] - 1
    assert compiled[0] == pytest.approx(eager[0], rel=0.01)
    assert compiled[-1] == pytest.approx(eager[-1], abs=0.35)
