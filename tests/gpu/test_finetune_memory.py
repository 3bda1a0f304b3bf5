"""The memory that a fine-tuning announces beside what PyTorch's allocator gives out on a card."""

import pytest
import torch

from bessemer.distributed.mesh import ALONE
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import save_model
from bessemer.posttraining.sft.config import SFTConfig
from bessemer.posttraining.sft.finetune_memory import TuningShape, tuning_memory
from bessemer.training.data.batch import Batch
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import NextTokenObjective
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.runtime import Runtime
from bessemer.training.starting_model import FROZEN, StartingModel
from bessemer.training.trainer import Trainer

pytestmark = pytest.mark.gpu

ROWS, LENGTH = 4, 512


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("paged", [False, True])
def test_the_memory_that_is_announced_is_that_of_a_step_on_a_card(tmp_path, method, paged):
    shape = ModelConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
    )
    save_model(initial_decoder(shape, seed=1), tmp_path / "model", tokenizer=None)
    settings = {"data": ["a.jsonl"], "dtype": "bfloat16", "steps": 2, "compile": False, "optimizer": "adamw"}
    settings |= {"batch_size": ROWS, "context_length": LENGTH, "optimizer_paging": paged}
    quantize = {"quantize": "nf4"} if method == "qlora" else {}
    config = SFTConfig.parse(settings | ({} if method == "full" else {"adapter": {"rank": 16, **quantize}}), "sft")
    device = torch.device("cuda")
    runtime = Runtime.of(config, device)
    model = StartingModel.of(tmp_path / "model", config, seed=1).whole(device)
    prepare_model(model, config, runtime, ALONE)
    trainer = Trainer(model, build_optimizers(model, config), NextTokenObjective(shape), runtime, gradient_clip=1.0)
    tokens_BT = torch.randint(0, shape.vocab_size, (ROWS, LENGTH))
    batch = Batch(tokens_BT, tokens_BT, torch.arange(LENGTH).repeat(ROWS, 1), torch.ones_like(tokens_BT))
    trainer.step(batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    trainer.step(batch)
    sizes = TuningShape(ROWS, LENGTH, 2, device="cuda", frozen=FROZEN["nf4"], paged=paged)
    assert tuning_memory(shape, method, sizes).peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
