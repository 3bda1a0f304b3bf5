"""A step waits for the device once: when its loss, its norm and its flags come to the host together."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bessemer.distributed.mesh import ALONE
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.data.batch import Batch
from bessemer.training.model_setup import prepare_model
from bessemer.training.objectives import build_objective, next_token_loss
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.optim.registry import OPTIMIZERS
from bessemer.training.optim.weight_averaging import MovingAverage
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer, on_host
from tests.cases import slow_but
from tests.pretended_mps import MPS, _OnMps, pretended_mps, to_mps

_aten = torch.ops.aten
#: Operations whose result, or the shape of it, the host reads from the device.
WAITING = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.repeat_interleave.Tensor,
}


class _Waits(TorchDispatchMode):
    """Lists the operations on tensors of the device for which the host waits."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if any(isinstance(leaf, _OnMps) for leaf in tree_leaves((arguments, options))) and self._waits(
            operation, arguments, options or {}
        ):
            self.found.append(operation)
        return operation(*arguments, **(options or {}))

    @staticmethod
    def _waits(operation, arguments, options):
        if operation is _aten._to_copy.default:
            return torch.device(options.get("device") or MPS).type == "cpu"
        if operation is _aten.copy_.default:
            return not isinstance(arguments[0], _OnMps)
        if operation is _aten.index.Tensor:
            return any(index is not None and index.dtype == torch.bool for index in arguments[1])
        return operation in WAITING


@contextmanager
def waits(monkeypatch):
    """While entered, a list of what the host waited for."""
    with _Waits() as mode, monkeypatch.context() as patch:
        whole = _OnMps.tolist
        patch.setattr(_OnMps, "tolist", lambda tensor: mode.found.append("tolist") or whole(tensor))
        yield mode.found


def test_what_waits_is_counted(monkeypatch):
    with pretended_mps(), waits(monkeypatch) as found:
        there = torch.arange(4.0).to(MPS)
        assert found == []
        float(there.sum())
        bool((there > 2).any())
        there.cpu()
        there.tolist()
        there[there > 2]
        torch.zeros(4).copy_(there)
    assert len(found) == 6


@pytest.mark.parametrize("optimizer", slow_but(["muon"], OPTIMIZERS))
def test_a_step_waits_once(optimizer, monkeypatch):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    with pretended_mps():
        config = PretrainConfig(steps=3, dtype="float32", compile=False, threads=1, optimizer=optimizer)
        model = to_mps(initial_decoder(ModelConfig(**shape, vocab_size=50, intermediate_size=40), seed=1))
        runtime = Runtime.of(config, MPS)
        model, _ = prepare_model(model, config, runtime, ALONE)
        trainer = Trainer(
            model,
            build_optimizers(model, config),
            build_objective(config, model.config),
            runtime,
            gradient_clip=1.0,
            micro_batch_size=1,
            average=MovingAverage(model, 0.9),
        )
        tokens_BT = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(0))
        batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])
        # the first step makes the optimizer's states
        trainer.step(batch)
        with waits(monkeypatch) as found:
            taken = trainer.step(batch)
            assert found == ["tolist"]
            refused = trainer.step(batch, lambda loss, norm: False)
            assert found == ["tolist"] * 2
    assert taken.updated and not refused.updated and refused.loss != taken.loss


def test_a_users_loss_does_not_wait_either(monkeypatch):
    with pretended_mps():
        model = to_mps(initial_decoder(ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1), seed=1))
        tokens_BT = torch.zeros(2, 8, dtype=torch.int64).to(MPS)
        with waits(monkeypatch) as found:
            next_token_loss(model, Batch(tokens_BT, tokens_BT)).backward()
    assert found == []


def test_numbers_of_every_kind_come_over_exactly():
    odd = 2**24 + 1
    tensors = [torch.tensor(0.1), torch.tensor([[odd, 1]]), torch.tensor(0.1, dtype=torch.bfloat16), torch.zeros(0)]
    assert on_host(tensors) == [[tensors[0].item()], [odd, 1], [tensors[2].item()], []]
