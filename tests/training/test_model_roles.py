"""What an objective asks of the models of a run."""

from contextlib import contextmanager

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.loop import train
from bessemer.training.model_roles import POLICY, REFERENCE, ModelRoles, OtherModel
from bessemer.training.model_setup import PreparedModel
from bessemer.training.objectives import Count, Objective, Terms
from bessemer.training.runtime import Runtime
from tests.distributed.parity import RandomBatches

from .conftest import TINY

SHAPE = ModelConfig(**{name: value for name, value in TINY.items() if name != "preset"}, vocab_size=97)


def policy():
    return initial_decoder(SHAPE, seed=2).train()


@contextmanager
def without_adapters(model):
    """The last norm stands for an adapter: it is one without it."""
    adapted = model.norm.weight.detach().clone()
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
    try:
        yield
    finally:
        with torch.no_grad():
            model.norm.weight.copy_(adapted)


def made(settings, model, **options):
    return ModelRoles({POLICY: PreparedModel(model, None)}, Runtime.of(settings, torch.device("cpu")), **options)


def log_probs_of(model, batch):
    """log p of each target by the plain formula, (B, T)."""
    log_probs_BTV = model(batch.tokens_BT).log_softmax(-1)
    has_target_BT = batch.targets_BT != IGNORE_INDEX
    return log_probs_BTV.gather(-1, batch.targets_BT.clamp(min=0)[..., None])[..., 0] * has_target_BT


@pytest.fixture
def batch():
    tokens_BT = torch.randint(0, 97, (4, 17), generator=torch.Generator().manual_seed(0))
    targets_BT = tokens_BT[:, 1:].clone()
    targets_BT[1, 3:] = IGNORE_INDEX
    return Batch(tokens_BT[:, :-1], targets_BT)


@pytest.mark.parametrize("size", [None, 3])
def test_log_probabilities_are_those_of_the_targets_and_leave_the_mode(settings, batch, size):
    model = policy()
    found = made(settings, model, micro_batch_size=size).log_probs(batch, POLICY)
    assert model.training
    torch.testing.assert_close(found, log_probs_of(policy(), batch).detach())


def test_the_reference_is_the_policy_without_its_adapters(settings, batch):
    model = policy()
    with torch.no_grad():
        model.norm.weight.mul_(3.0)
    models = made(settings, model, without_adapters=without_adapters)
    torch.testing.assert_close(models.log_probs(batch, REFERENCE), log_probs_of(policy(), batch).detach())
    assert (model.norm.weight == 3.0).all()


def test_a_role_that_the_run_does_not_have_is_named(settings, batch):
    with pytest.raises(ConfigError, match="this run has no reference; it has policy"):
        made(settings, policy()).log_probs(batch)


class NearReference(Objective):
    """Distance of the log-probabilities to the reference's."""

    def denominators(self, batch):
        return {"distance": Count(batch.targets)}

    def annotate(self, models, batch):
        return batch.with_values(per_token={"reference": models.log_probs(batch)})

    def __call__(self, model, batch, context):
        return Terms({"distance": (log_probs_of(model, batch) - batch.per_token["reference"]).square().sum()})


def test_a_run_gives_its_objective_the_reference(settings, tmp_path):
    model = policy()
    with torch.no_grad():
        model.norm.weight.mul_(3.0)
    config = settings.with_changes(steps=30, learning_rate=0.1, freeze=["layers.*", "embed_tokens.*"])
    batches = RandomBatches(config.batch_size, config.context_length, 97)
    options = {"objective": NearReference(), "others": [OtherModel(REFERENCE, policy())]}
    train(model, batches, config, tmp_path, runtime=Runtime.of(config, torch.device("cpu")), seed=1, **options)
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(("guards", "skipped"), [(True, 1), (False, 0)])
def test_a_loss_is_a_sign_of_trouble_only_where_the_objective_says_so(settings, tmp_path, guards, skipped):
    class Jumping(Objective):
        """A loss that jumps once, by a number, while its gradient stays as it is."""

        guards_loss = guards

        def denominators(self, batch):
            return {"loss": Count(1.0, "constant")}

        def __call__(self, model, batch, context):
            return Terms({"loss": model.norm.weight.sum() * 1e-3 + (100.0 if batch.tokens_BT[0, 0] == 96 else 1.0)})

    class Jumps(RandomBatches):
        def batch(self, step, rows=slice(None), mesh=None):
            tokens_BT = torch.full((self.batch_size, 4), 96 if step == 130 else 1)
            return Batch(tokens_BT, tokens_BT)

    config = settings.with_changes(steps=132, skip_loss_spikes="always", diagnostics_every=0, optimizer="adamw")
    options = {"runtime": Runtime.of(config, torch.device("cpu")), "seed": 1, "objective": Jumping()}
    train(policy(), Jumps(2, 4, 97), config, tmp_path, **options)
    assert sum("skipped" in record for record in read_metrics(tmp_path / "metrics.jsonl")) == skipped
