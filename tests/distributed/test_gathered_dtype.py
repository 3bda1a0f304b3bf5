"""Matrices that FSDP gathers in the dtype in which products read them give the numbers of those that autocast casts."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bessemer.core.metrics import METRICS, read_metrics
from bessemer.distributed.layout import Layout
from bessemer.distributed.mesh import Mesh
from bessemer.distributed.sharding import apply_fsdp, release_gathered
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.layers.feed_forward import Experts
from bessemer.training.loop import train
from bessemer.training.model_roles import POLICY
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from tests.cases import slow

from .parity import SETTINGS, TWO_LAYERS, RandomBatches, trained
from .test_expert import GPT_OSS, SPARSE
from .test_tensor import CASES

BFLOAT16 = {"dtype": "bfloat16"}
#: Rows of grouped products in bfloat16 are multiples of 16 bytes.
WIDE = {"moe_intermediate_size": 16}


def gathered(dtype=torch.bfloat16, **options):
    """`trained` in float32 under autocast, where FSDP gathers matrices in a dtype; None: as they are stored."""
    before = Runtime.gathered_dtype
    Runtime.gathered_dtype = property(lambda runtime: dtype)
    try:
        return trained(dtype=torch.float32, **options)
    finally:
        Runtime.gathered_dtype = before


@pytest.mark.parametrize(
    "options",
    [
        slow({"settings": BFLOAT16 | {"micro_batch_size": 1}}),
        {"model": GPT_OSS | WIDE, "settings": BFLOAT16 | {"activation_checkpointing": "full"}, "packed": True},
        slow({"model": SPARSE | WIDE, "parallel": {"expert": 2}, "settings": BFLOAT16}),
        slow({"parallel": {"tensor": 2}, "model": CASES["gpt2"][0], "settings": BFLOAT16}),
        slow({"parallel": {"data_replicate": 2}, "settings": BFLOAT16 | {"optimizer": "muon"}}),
        slow({"parallel": {"context": 2}, "settings": BFLOAT16}),
        slow({"model": CASES["olmo"][0], "settings": BFLOAT16 | {"activation_checkpointing": "selective"}}),
        slow({"model": CASES["linear attention"][0], "settings": BFLOAT16}),
        slow({"model": CASES["latent"][0], "settings": BFLOAT16}),
        slow({"settings": BFLOAT16 | {"compile": True}}),
    ],
    ids=[
        "micro-batches",
        "experts",
        "expert axis",
        "tensor axis",
        "replicated",
        "context",
        "olmo",
        "linear",
        "latent",
        "compiled",
    ],
)
def test_the_step_is_that_of_matrices_gathered_whole(two, options):
    options = {"parallel": {}} | options
    found, expected = (two.run(gathered, dtype=dtype, **options)[0] for dtype in (torch.bfloat16, None))
    assert found.losses == expected.losses and found.norms == expected.norms
    for kind in ("gradients", "weights"):
        for name, tensor in getattr(expected, kind).items():
            assert torch.equal(getattr(found, kind)[name], tensor), (kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [slow({"pipeline": 2, "data_shard": 2}), {"tensor": 2, "data_shard": 2}], ids=str)
def test_so_it_is_on_four_ranks(four, parallel):
    options = {"parallel": parallel, "settings": BFLOAT16}
    found, expected = (four.run(gathered, dtype=dtype, **options)[0] for dtype in (torch.bfloat16, None))
    assert found.losses == expected.losses
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())


def logged(out, dtype, parallel):
    """The metrics of a run where matrices are gathered in a dtype: diagnostics, likelihoods of weights and of their average."""
    changes = {"parallel": parallel, "diagnostics_every": 1, "ema": 0.9, "checkpoint_minutes": 1e9}
    config = PretrainConfig(**SETTINGS | BFLOAT16 | changes)
    mesh = Mesh.here(config.parallel, "cpu")
    decoder = initial_decoder(ModelConfig(**TWO_LAYERS), seed=3)
    batches = RandomBatches(config.batch_size, config.context_length, TWO_LAYERS["vocab_size"])
    tokens_BT = torch.arange(8 * 16).reshape(8, 16) % TWO_LAYERS["vocab_size"]

    def score(finished, trainer):
        with trainer.averaged(), trainer.models.prepared(POLICY):
            average = trainer.negative_log_likelihood(tokens_BT, tokens_BT.roll(-1, 1))
        with trainer.models.prepared(POLICY):
            return {"average": average, "weights": trainer.negative_log_likelihood(tokens_BT, tokens_BT.roll(-1, 1))}

    before = Runtime.gathered_dtype
    Runtime.gathered_dtype = property(lambda runtime: dtype)
    try:
        runtime = Runtime.of(config, torch.device("cpu"))
        train(decoder, batches, config, out, runtime=runtime, seed=1, on_step_end=score, mesh=mesh)
    finally:
        Runtime.gathered_dtype = before
    timed = {"seconds", "tokens_per_second", "gflops", "data_wait", "peak_memory_bytes"}
    return [{name: value for name, value in line.items() if name not in timed} for line in read_metrics(out / METRICS)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, slow({"pipeline": 2})], ids=str)
def test_diagnostics_and_validation_are_the_same_too(two, parallel, tmp_path):
    found, expected = (
        two.run(logged, out=tmp_path / str(dtype), dtype=dtype, parallel=parallel)[0] for dtype in (torch.bfloat16, None)
    )
    assert found == expected and "average" in found[-1]


def seen_dtypes():
    """By name, the dtypes of a sharded model's parameters while their module computes, and as they are stored."""
    model = initial_decoder(ModelConfig(**GPT_OSS | WIDE | {"attention_bias": True}), seed=3).train()
    apply_fsdp(model, Mesh.of(Layout(data_shard=2), "cpu"), dtype=torch.bfloat16)
    seen = {}

    def note(module, arguments, options, prefix):
        seen.update({f"{prefix}.{name}": each.dtype for name, each in module.named_parameters(recurse=False)})

    for prefix, module in model.named_modules():
        module.register_forward_pre_hook(lambda *given, prefix=prefix: note(*given, prefix=prefix), with_kwargs=True)
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(torch.arange(16)[None])
    # no backward pass follows, in which the last block would be
    release_gathered(model)
    matrices = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name, each in module.named_parameters(recurse=False)
        if "layers." in prefix and name in ("weight", "gate_up_proj", "down_proj") and isinstance(module, nn.Linear | Experts)
    }
    return seen, matrices, {name: parameter.dtype for name, parameter in model.named_parameters()}


def test_only_matrices_of_blocks_are_gathered_in_bfloat16(two):
    for seen, matrices, stored in two.run(seen_dtypes):
        assert {name for name, dtype in seen.items() if dtype == torch.bfloat16} == matrices
        rest = {name.rpartition(".")[2] for name in seen.keys() - matrices}
        assert rest >= {"weight", "bias", "gate_up_bias", "down_bias"}
        assert set(stored.values()) == {torch.float32}


def gathered_after_a_forward_pass(tied):
    """The modules that FSDP gathers by themselves, and those that are still gathered where the backward pass begins."""
    model = initial_decoder(ModelConfig(**TWO_LAYERS | {"tie_word_embeddings": tied}), seed=3).train()
    apply_fsdp(model, Mesh.of(Layout(data_shard=2), "cpu"))
    model.hidden(torch.arange(8)[None])
    units = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    own = {name: next(module.parameters()) for name, module in units.items()}
    return set(units), {name for name, parameter in own.items() if not isinstance(parameter, DTensor)}


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_head_and_blocks_are_gathered_by_themselves_and_the_last_block_stays(two, tied):
    ends = set() if tied else {"embed_tokens", "lm_head"}
    for units, kept in two.run(gathered_after_a_forward_pass, tied=tied):
        assert units == {"", "layers.0", "layers.1"} | ends
        assert kept == {"", "layers.1"} | ends
