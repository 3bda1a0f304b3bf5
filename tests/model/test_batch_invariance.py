"""Batch-invariant kernels: what the engine's sampler says of a token and what a trainer computes for it are the same bits."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.steps.plain import PlainSteps
from bessemer.inference.offline import Rollouts
from bessemer.model.adapters.trained import adapter_of, add_adapters, without_adapters
from bessemer.model.cpu_kernels import library
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import load_model
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.head import target_log_probs
from tests.cases import slow_but
from tests.inference.models import ARCHITECTURES, small_decoder, small_tokenizer
from tests.model.family_models import ONE_OF_EACH, make

pytestmark = pytest.mark.skipif(library() is None, reason="there are no compiled kernels here")

TEMPERATURE = 0.8
REFUSED = {"experts", "latent", "linear", "alibi"}
#: Families with experts, latent or linear attention.
SPARSE = {"deepseek_v3", "gpt_oss", "llama4_text", "mixtral", "qwen3_moe", "qwen3_next"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def sampled(engine: Engine, vocabulary: int, seed: int, adapter: str | None = None) -> Rollouts:
    """Completions of prompts of several lengths, some with a long prefix in common."""
    random_prompts = random.Random(seed)
    shared = [random_prompts.randrange(3, vocabulary) for _ in range(18)]
    prompts = [
        shared[: random_prompts.randrange(1, 19)] + [random_prompts.randrange(3, vocabulary) for _ in range(length)]
        for length in (0, 1, 7, 12)
    ]
    params = SamplingParams(temperature=TEMPERATURE, max_tokens=10, seed=seed, ignore_eos=True)
    return engine.rollouts(prompts, 2, params, adapter=adapter)


def by_modules(engine: Engine) -> Engine:
    """The same engine without its compiled step: the model's modules over a KV cache, as under an adapter."""
    core, runner = engine.core, engine.core.runner
    runner.backend = dataclasses.replace(runner.backend, whole=None, generator=None)
    for name, value in vars(core).items():
        if isinstance(value, PlainSteps):
            setattr(core, name, PlainSteps(runner))
    return engine


def trained(model: Decoder, rollouts: Rollouts, width: int, order: Sequence[int]) -> Tensor:
    """A trainer's log-probabilities of the same tokens, (R, T) as of the rollouts: in packed rows of `width` tokens, in an
    order, with gradients."""
    rows: list[list[int]] = [[]]
    lengths = (rollouts.lengths - 1).tolist()
    for sample in order:
        if sum(lengths[one] for one in rows[-1]) + lengths[sample] > width:
            rows.append([])
        rows[-1].append(sample)
    tokens_BT, documents_BT, positions_BT = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    targets_BT = torch.full_like(tokens_BT, IGNORE_INDEX)
    places = {}
    for row, members in enumerate(rows):
        start = 0
        for number, sample in enumerate(members, start=1):
            place = places[sample] = (row, slice(start, start + lengths[sample]))
            tokens_BT[place], targets_BT[place] = (
                rollouts.tokens[sample, : lengths[sample]],
                rollouts.tokens[sample, 1 : lengths[sample] + 1],
            )
            documents_BT[place], positions_BT[place] = number, torch.arange(lengths[sample])
            start += lengths[sample]
    hidden_BTD = model.hidden(tokens_BT, positions_BT=positions_BT, document_ids_BT=documents_BT)
    log_probs_BT, _ = target_log_probs(model, hidden_BTD, targets_BT, temperature=TEMPERATURE)
    assert log_probs_BT.requires_grad
    log_probs_RT = torch.zeros(rollouts.log_probs.shape)
    for sample, place in places.items():
        log_probs_RT[sample, 1 : lengths[sample] + 1] = log_probs_BT[place]
    return log_probs_RT


def assert_bitwise(model: Decoder, rollouts: Rollouts, seed: int) -> None:
    """Whatever the packing, and alone with one thread."""
    samples = list(range(len(rollouts.tokens)))
    longest, most = int(rollouts.lengths.max()) - 1, model.config.max_position_embeddings
    random.Random(seed).shuffle(samples)
    for width, order in ((longest, samples), (most, samples), (most, samples[::-1])):
        assert torch.equal(trained(model, rollouts, width, order)[rollouts.mask], rollouts.log_probs[rollouts.mask])


@pytest.mark.parametrize(
    "name", slow_but(["windows", "sinks and caps"], [name for name in ARCHITECTURES if name not in REFUSED])
)
def test_sampler_and_trainer_agree_to_the_bit_for_each_architecture(name, tokenizer):
    model = small_decoder(name)
    model.use_batch_invariant_kernels()
    model.train()
    # prompts in chunks of 5 tokens beside others that decode, and all at once
    for seed, (batched, sequences, threads) in enumerate([(5, 3, 2), (512, 8, 1)]):
        config = EngineConfig(max_num_batched_tokens=batched, max_num_seqs=sequences, threads=threads, cpu_kernels="on")
        assert_bitwise(model, sampled(Engine(model, tokenizer, config=config), 200, seed), seed)
    assert_bitwise(model, sampled(by_modules(Engine(model, tokenizer, config=config)), 200, 3), 3)


@pytest.mark.parametrize("family", slow_but(["gpt2", "gemma3"], [family for family in ONE_OF_EACH if family not in SPARSE]))
def test_sampler_and_trainer_agree_to_the_bit_for_each_dense_family(family, tokenizer, tmp_path):
    make(family).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    before = model(torch.arange(3, 23)[None]).detach()
    model.use_batch_invariant_kernels()
    assert (model(torch.arange(3, 23)[None]) - before).abs().max() < 1e-4
    model.train()
    engine = Engine(model, tokenizer, config=EngineConfig(max_num_batched_tokens=7, max_num_seqs=4, cpu_kernels="on"))
    assert_bitwise(model, sampled(engine, 97, 1), 1)


def test_an_adapter_beside_the_weights_agrees_to_the_bit(tokenizer):
    model = small_decoder("dense")
    updates = add_adapters(model, rank=3, scale=1.7)
    for number, update in enumerate(updates.values()):
        generator = torch.Generator().manual_seed(number)
        torch.nn.init.normal_(update.down, std=0.2, generator=generator)
        torch.nn.init.normal_(update.up, std=0.2, generator=generator)
    model.use_batch_invariant_kernels()
    model.train()
    with without_adapters(model):
        engine = Engine(model, tokenizer, config=EngineConfig(max_num_batched_tokens=5, max_num_seqs=3, cpu_kernels="on"))
        engine.load_adapter("policy", adapter_of(model))
        rollouts = sampled(engine, 200, 4, adapter="policy")
    assert_bitwise(model, rollouts, 4)
    with torch.no_grad():
        for update in updates.values():
            update.up.mul_(0.5)
    with without_adapters(model):
        engine.update_adapter("policy", adapter_of(model))
        rollouts = sampled(engine, 200, 5, adapter="policy")
    assert_bitwise(model, rollouts, 5)


def test_changed_weights_agree_to_the_bit_in_a_running_engine(tokenizer):
    model = small_decoder("dense")
    model.use_batch_invariant_kernels()
    config = EngineConfig(cpu_kernels="on")
    engines = [Engine(model, tokenizer, config=config), by_modules(Engine(model, tokenizer, config=config))]
    first = [sampled(engine, 200, 1).log_probs for engine in engines]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    for engine, before in zip(engines, first, strict=True):
        engine.update_weights()
        rollouts = sampled(engine, 200, 1)
        assert not torch.equal(rollouts.log_probs, before)
        assert_bitwise(model, rollouts, 1)


def test_completions_that_share_their_prompt_in_a_row_have_the_bits_of_each_alone():
    model = small_decoder("dense")
    model.use_batch_invariant_kernels()
    prompt, first, second = (torch.randint(3, 200, (length,)) for length in (9, 5, 8))
    tokens_1T = torch.cat((prompt, first, second))[None]
    positions_1T = torch.cat((torch.arange(14), torch.arange(9, 17)))[None]
    documents_1T = torch.tensor([[1] * 9 + [2] * 5 + [3] * 8])
    # the prompt is seen by the documents up to the third, each completion by itself
    visible_1T = torch.tensor([[3] * 9 + [2] * 5 + [3] * 8])
    shared = model.hidden(tokens_1T, positions_BT=positions_1T, document_ids_BT=documents_1T, visible_to_BT=visible_1T)
    alone = model.hidden(torch.cat((prompt, second))[None])
    assert torch.equal(shared[0, 14:], alone[0, 9:])


def test_gradients_are_those_of_the_plain_model():
    plain, invariant = small_decoder("sinks and caps"), small_decoder("sinks and caps")
    invariant.use_batch_invariant_kernels()
    tokens_BT = torch.randint(3, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    documents_BT = torch.tensor([[1] * 12 + [2] * 18] * 2)
    for model in (plain, invariant):
        hidden_BTD = model.hidden(tokens_BT, document_ids_BT=documents_BT)
        log_probs_BT, entropy_BT = target_log_probs(model, hidden_BTD, tokens_BT.roll(-1, 1), temperature=TEMPERATURE)
        (log_probs_BT.sum() + entropy_BT.sum()).backward()
    for (name, first), second in zip(plain.named_parameters(), invariant.parameters(), strict=True):
        assert torch.allclose(first.grad, second.grad, rtol=1e-3, atol=1e-3 * float(first.grad.abs().max())), name


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_fixed_order_is_refused(name):
    with pytest.raises(ConfigError, match="batch-invariant kernels cannot compute this model: it"):
        small_decoder(name).use_batch_invariant_kernels()


def test_a_function_of_unknown_order_is_refused_inside_a_block():
    model = small_decoder("dense")
    model.use_batch_invariant_kernels()
    model.blocks[0].mlp.activation = lambda hidden: hidden.softmax(-1)
    with pytest.raises(ConfigError, match=r"torch\.Tensor\.softmax, whose sums have no fixed order"):
        model.hidden(torch.arange(3, 9)[None])
