"""Matrices, vocabulary and tokens shared by the ranks of the tensor axis give the step of one process."""

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy

from bessemer.core.errors import ConfigError
from bessemer.distributed.layout import Layout, ParallelConfig
from bessemer.distributed.mesh import Mesh
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.training.checkpoint.manager import CHECKPOINTS, checkpoint_weights, newest_checkpoint
from bessemer.training.head import head_divergence, linear_cross_entropy, token_log_probs
from bessemer.training.model_setup import prepare_model
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from tests.cases import slow, slow_but

from ..training.test_head import Largest, chunks_of, made, made_pair, weighed
from .parity import DENSE, SETTINGS, TWO_LAYERS, RandomBatches, assert_equal, trained
from .test_resume import run

EXACT = 1e-9
EXPERTS = TWO_LAYERS | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "shared_expert_gate": True,
}
#: Pieces of the tensor axis that FSDP cannot cut evenly.
ODD = TWO_LAYERS | {"intermediate_size": 66, "vocab_size": 98, "hidden_size": 30, "num_attention_heads": 6}
#: By name: what a model has that is cut in a way of its own, and the settings of the run.
CASES = {
    "dense": (DENSE, {}),
    "tied": (TWO_LAYERS | {"tie_word_embeddings": True}, {}),
    "capped, with a z-loss": (TWO_LAYERS | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0}, {"z_loss": 0.01}),
    "gpt2": (
        TWO_LAYERS
        | {
            "position_type": "learned",
            "norm_type": "layer",
            "qk_norm": "none",
            "num_key_value_heads": 4,
            "hidden_act": "gelu_new",
            "gated_mlp": False,
            "attention_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        {},
    ),
    "gemma": (
        TWO_LAYERS
        | {
            "norm_position": "both",
            "norm_offset": True,
            "embedding_multiplier": 5.5,
            "layer_types": ("sliding_attention", "full_attention"),
            "sliding_window": 5,
            "tie_word_embeddings": True,
        },
        {},
    ),
    "olmo": (TWO_LAYERS | {"qk_norm": "full", "norm_position": "after"}, {}),
    "layer norm over all heads": (TWO_LAYERS | {"qk_norm": "full", "norm_type": "layer"}, {}),
    "sinks, gate and biases": (
        TWO_LAYERS | {"attention_sinks": True, "attention_output_gate": True, "attention_bias": True},
        {},
    ),
    "alibi": (TWO_LAYERS | {"position_type": "alibi"}, {}),
    "sinusoidal": (TWO_LAYERS | {"position_type": "sinusoidal"}, {}),
    "experts": (
        EXPERTS
        | {
            "router_aux_loss_coef": 0.1,
            "router_z_loss_coef": 0.1,
            "router_correction_bias": True,
            "router_bias_update_rate": 0.1,
            "expert_bias": True,
            "mlp_bias": True,
        },
        {},
    ),
    "latent": (
        TWO_LAYERS | {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8},
        {},
    ),
    "linear attention": (TWO_LAYERS | {"layer_types": ("linear_attention", "full_attention"), "linear_key_head_dim": 8}, {}),
    "multi-token prediction": (TWO_LAYERS | {"num_nextn_predict_layers": 2}, {}),
    "recomputed, in micro-batches": (DENSE, {"activation_checkpointing": "full", "micro_batch_size": 3}),
    "recomputed in part": (EXPERTS, {"activation_checkpointing": "selective", "micro_batch_size": 4}),
}
#: Tested on every run; the others with the slow ones.
USUAL = {"experts"}


@pytest.mark.parametrize("name", slow_but(USUAL, CASES))
def test_two_ranks_are_one(two, alone, name):
    model, settings = CASES[name]
    options = {"model": model, "settings": settings}
    assert_equal(two.run(trained, parallel={"tensor": 2}, **options)[0], alone(**options), EXACT)


# by default "packed" of the methods (`test_methods.py`)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "alibi", "linear attention", "multi-token prediction"])
def test_of_packed_documents_too(two, alone, name):
    options = {"model": CASES[name][0], "packed": True}
    assert_equal(two.run(trained, parallel={"tensor": 2}, **options)[0], alone(**options), EXACT)


@pytest.mark.parametrize(
    "parallel, model",
    [
        ({"tensor": 2, "data_shard": 2}, TWO_LAYERS),
        slow({"tensor": 2, "data_replicate": 2}, EXPERTS),
        slow({"tensor": 2, "data_shard": 2}, ODD),
        slow({"tensor": 2, "context": 2}, DENSE),
        slow({"tensor": 2, "context": 2, "context_method": "ring"}, EXPERTS),
        slow({"tensor": 4}, EXPERTS | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if "tensor" in value else "",
)
def test_four_ranks_are_one(four, alone, parallel, model):
    assert_equal(four.run(trained, parallel=parallel, model=model)[0], alone(model=model), EXACT)


@pytest.mark.parametrize(
    "schedule, model",
    [
        # by default the axis of tensors beside those of shards, experts and tokens, and a pipeline beside shards and tokens
        slow("1f1b", TWO_LAYERS | {"tie_word_embeddings": True, "num_nextn_predict_layers": 1}),
        slow("zero_bubble", EXPERTS | {"num_hidden_layers": 4, "router_aux_loss_coef": 0.1}),
        slow("zbv", DENSE),
    ],
    ids=["1f1b", "zero bubble", "zbv"],
)
def test_in_the_stages_of_a_pipeline(four, alone, schedule, model):
    parallel = {"tensor": 2, "pipeline": 2, "pipeline_schedule": schedule}
    options = {"model": model, "settings": {"micro_batch_size": 2}}
    assert_equal(four.run(trained, parallel=parallel, **options)[0], alone(**options), EXACT)


# on every run: each optimizer on pieces in `test_optimizers.py` and `test_whole_matrices.py`
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_other_optimizers_move_pieces_as_the_whole(four, alone, optimizer):
    options = {"model": EXPERTS, "settings": {"optimizer": optimizer}}
    assert_equal(four.run(trained, parallel={"tensor": 2, "data_shard": 2}, **options)[0], alone(**options), EXACT)


def test_a_run_on_two_ranks_goes_on_alone(two, tmp_path):
    expected = run(tmp_path / "whole")
    assert two.run(run, out=tmp_path / "moved", parallel={"tensor": 2}, stop_after=2)[0] == "stopped"
    assert run(tmp_path / "moved") == pytest.approx(expected, rel=EXACT)
    found, wanted = (checkpoint_weights(newest_checkpoint(tmp_path / name / CHECKPOINTS)) for name in ("moved", "whole"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=EXACT, atol=1e-12, msg=name)


def validated(model, parallel=None):
    """The likelihood of some targets, their logits, and the largest tensor that a rank's head made of a batch's."""
    config = PretrainConfig(**(SETTINGS | {"parallel": parallel or {}}))
    mesh = Mesh.here(ParallelConfig(**(parallel or {})), "cpu") if parallel else Mesh(Layout())
    decoder = initial_decoder(ModelConfig(**model), seed=3).double()
    part, _ = prepare_model(decoder, config, Runtime.of(config, torch.device("cpu")), mesh)
    trainer = Trainer(
        part, build_optimizers(part, config), None, Runtime.of(config, torch.device("cpu")), gradient_clip=1.0, mesh=mesh
    )
    batch = RandomBatches(config.batch_size, config.context_length, model["vocab_size"]).batch(0)
    part.eval()
    with torch.no_grad():
        return trainer.negative_log_likelihood(batch.tokens_BT, batch.targets_BT), part(batch.tokens_BT)


def test_validation_and_logits_are_those_of_one(two):
    model = TWO_LAYERS | {"final_logit_softcapping": 2.0}
    expected, logits_BTV = validated(model)
    batch = RandomBatches(8, 16, 96).batch(0)
    assert expected == pytest.approx(
        cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), reduction="sum").item()
    )
    for found, found_BTV in two.run(validated, model=model, parallel={"tensor": 2}):
        assert found == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(found_BTV, logits_BTV, rtol=1e-12, atol=1e-12)


def largest_tensor_of_the_loss(tokens, width, vocab_size, chunk):
    """Elements of the largest tensor that a rank makes of a batch's states and a vocabulary shared by all ranks."""
    mesh = Mesh.here(ParallelConfig(tensor=2), "cpu")
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight_VD = distribute_tensor(torch.randn(vocab_size, width, generator=generator), mesh.tensor, [Shard(0)])
    targets_N = torch.randint(0, vocab_size, (tokens,), generator=generator)
    with chunks_of(chunk), Largest() as largest:
        linear_cross_entropy(hidden_ND, weight_VD.requires_grad_(), targets_N).backward()
    return largest.elements


def test_logits_are_never_brought_together(two):
    found = two.run(largest_tensor_of_the_loss, tokens=512, width=8, vocab_size=256, chunk=4096)
    assert found == [4096, 4096] and 4096 < 512 * 256 // 2


def losses_of_the_head(ranks):
    """Values and gradients of every loss of the head, with the vocabulary sharded over the ranks."""
    *pair, mask_N = made_pair(40, (6, 5), 24)
    targets_N = made(40, 6, 24)[2]
    if ranks > 1:
        axis = Mesh.here(ParallelConfig(tensor=ranks), "cpu").tensor
        pair[1::2] = [distribute_tensor(weight_VD.detach(), axis, [Shard(0)]).requires_grad_() for weight_VD in pair[1::2]]
    hidden_ND, weight_VD = pair[:2]
    options = {"mask_N": mask_N, "beta": 0.3, "temperature": 0.7, "student_softcap": 2.0}
    with chunks_of(120, 48):
        results = [
            linear_cross_entropy(hidden_ND, weight_VD, targets_N, 2.0, 0.1)[None],
            *token_log_probs(hidden_ND, weight_VD, targets_N, temperature=0.7, softcap=2.0),
            *(head_divergence(*pair, kind, **options) for kind in ("forward_kl", "reverse_kl", "jsd")),
            # whose exponentials are beyond float64
            linear_cross_entropy(300 * hidden_ND, weight_VD, targets_N)[None],
            *token_log_probs(300 * hidden_ND, weight_VD, targets_N),
            head_divergence(300 * hidden_ND, *pair[1:], "reverse_kl", mask_N=mask_N),
        ]
        found = []
        for result in results:
            of_hidden_ND, of_weight_VD = torch.autograd.grad(weighed([result]), (hidden_ND, weight_VD), retain_graph=True)
            whole_VD = of_weight_VD.full_tensor() if ranks > 1 else of_weight_VD
            found.append((result.detach(), of_hidden_ND, whole_VD))
    return found


def test_losses_of_a_shared_vocabulary_are_those_of_one(two):
    expected = losses_of_the_head(ranks=1)
    for found in two.run(losses_of_the_head, ranks=2):
        # the largest logits are in the thousands, and their rounding alone is 5e-13
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def divergence_from_a_whole_teacher():
    *pair, _ = made_pair(4, (6, 5), 24)
    axis = Mesh.here(ParallelConfig(tensor=2), "cpu").tensor
    pair[1] = distribute_tensor(pair[1].detach(), axis, [Shard(0)])
    with pytest.raises(ValueError, match="student and teacher must have the vocabulary sharded alike"):
        head_divergence(*pair, "jsd")


def test_a_teacher_that_is_not_sharded_with_its_student_is_refused(two):
    two.run(divergence_from_a_whole_teacher)


@pytest.mark.slow
def test_in_half_precision_it_stays_near_one_process(two):
    options = {"dtype": torch.float32, "model": EXPERTS, "settings": {"dtype": "bfloat16", "steps": 1}}
    found, expected = two.run(trained, parallel={"tensor": 2}, **options)[0], trained(**options)
    assert found.losses == pytest.approx(expected.losses, rel=2e-3)
    assert found.norms == pytest.approx(expected.norms, rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_blocks_compile(two, model):
    compiled = two.run(trained, parallel={"tensor": 2}, model=model, settings={"compile": True})[0]
    assert_equal(compiled, trained(model=model), EXACT)


@pytest.mark.slow
def test_on_the_same_ranks_every_bit_is_the_same(two, tmp_path):
    options = {"parallel": {"tensor": 2}, "dtype": torch.float32, "optimizer": "muon", "ema": 0.9}
    two.run(run, out=tmp_path / "whole", **options)
    two.run(run, out=tmp_path / "stopped", stop_after=3, **options)
    two.run(run, out=tmp_path / "stopped", **options)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "tensor 4 does not divide num_attention_heads 6"),
        ({"num_key_value_heads": 2}, "tensor 4 does not divide num_key_value_heads 2"),
        ({"intermediate_size": 66}, "tensor 4 does not divide intermediate_size 66"),
        ({"vocab_size": 98}, "tensor 4 does not divide vocab_size 98"),
        ({"num_experts": 6, "moe_intermediate_size": 8}, "tensor 4 does not divide num_experts 6"),
        (
            {"num_experts": 4, "shared_expert_intermediate_size": 6},
            "tensor 4 does not divide shared_expert_intermediate_size 6",
        ),
        (
            {"layer_types": ("linear_attention",) * 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
            "tensor 4 does not divide linear_num_key_heads 2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_cannot_be_cut_is_refused(changes, message):
    model = ModelConfig(**(DENSE | {"num_key_value_heads": 4} | changes))
    with pytest.raises(ConfigError, match=message):
        Layout(tensor=4).check(model, 16)


def test_what_a_model_has_not_need_not_divide():
    latent = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 1}
    Layout(tensor=4).check(ModelConfig(**(DENSE | latent)), 16)
    sparse = {"num_key_value_heads": 4, "num_experts": 4, "intermediate_size": 66}
    Layout(tensor=4).check(ModelConfig(**(DENSE | sparse)), 16)
