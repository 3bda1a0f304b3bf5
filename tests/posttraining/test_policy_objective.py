"""The objective of reinforcement learning beside plain formulas of one sample at a time, and what may not change it."""

from dataclasses import replace

import pytest
import torch

from bessemer.model.storage.folder import load_model
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.methods import PRESETS
from bessemer.posttraining.rl.objective import OLD, TOKEN_REFERENCE_LOG_PROBS, PolicyObjective
from bessemer.posttraining.sampling.samples import ADVANTAGES, Prompt, Sample, pack_samples
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.head import target_log_probs
from bessemer.training.objectives import LossContext
from tests.cases import in_turn
from tests.inference.models import small_decoder

GROUP, TEMPERATURE = 3, 0.7
#: Prompt and completion lengths of two groups of three; the fifth sample has no reward.
LENGTHS = [(4, 6), (4, 2), (4, 9), (7, 3), (7, 5), (7, 1)]
KEPT = [True, True, True, True, False, True]


def numbers(*shape, seed=0, scale=0.3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder).double()


@pytest.fixture(scope="module")
def samples(model):
    """Random completions with the sampler's log-probabilities a little off the model's."""
    made = []
    for place, (prompt, completion) in enumerate(LENGTHS):
        asked = torch.randint(4, 300, (prompt,), generator=torch.Generator().manual_seed(60 + place // GROUP))
        ids = torch.cat([asked, torch.randint(4, 300, (completion,), generator=torch.Generator().manual_seed(place))])
        with torch.no_grad():
            own = log_probs_of(model, ids.tolist(), prompt)
        made.append(Sample(Prompt("?"), ids.tolist(), prompt, (own + numbers(completion, seed=place)).tolist(), "", False))
    return made


def log_probs_of(model, ids, prompt_length):
    logits = model(torch.tensor([ids[:-1]]))[0] / TEMPERATURE
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[prompt_length - 1 :, 0]


def config_of(**settings):
    base = {"data": ["p.jsonl"], "group_size": GROUP, "batch_size": 6, "temperature": TEMPERATURE, "max_tokens": 9}
    return RLConfig.parse({**base, **settings}, "rl")


def by_token(packed, values):
    """Values of each sample's completion, at the places of its tokens in the batch, (B, T)."""
    found = torch.zeros(packed.batch.tokens_BT.shape, dtype=torch.float64)
    for place, value in enumerate(values):
        row, column = packed.rows_R[place], packed.columns_R[place]
        documents = packed.batch.document_ids_BT
        here = torch.ones_like(found[row], dtype=torch.bool) if documents is None else documents[row] == column + 1
        found[row, here.nonzero()[-LENGTHS[place][1] :, 0]] = value
    return found


def batch_of(samples, advantages, old, reference, shared_row=None):
    packed = pack_samples(samples, KEPT, 0, shared_row=shared_row)
    tokens = torch.tensor([length if kept else 0 for (_, length), kept in zip(LENGTHS, KEPT, strict=True)])
    of_group = {
        "group_tokens": tokens.view(-1, GROUP).sum(1).repeat_interleave(GROUP).double(),
        "group_answers": (tokens > 0).view(-1, GROUP).sum(1).repeat_interleave(GROUP).double(),
    }
    values = {
        ADVANTAGES: packed.batch.of_tokens(packed.of_sequences(torch.tensor(advantages, dtype=torch.float64))),
        OLD: by_token(packed, old),
        TOKEN_REFERENCE_LOG_PROBS: by_token(packed, reference),
    }
    per_sequence = {name: packed.of_sequences(value) for name, value in of_group.items()}
    return packed.batch.with_values(per_token=values, per_sequence=per_sequence)


def in_micro_batches(objective, model, batch, size):
    counts = objective.denominators(batch)
    parts = [
        objective(model, batch.rows(slice(start, start + size)), LossContext())
        for start in range(0, batch.tokens_BT.shape[0], size)
    ]
    total = sum(part.sums[name] / counts[name].value for part in parts for name in part.sums)
    return total, parts


def plain_loss(model, samples, config, advantages, old, reference):
    """Formulas of the papers with loops, of samples run alone."""
    losses, divergences = {}, {}
    for place, sample in enumerate(samples):
        if not KEPT[place]:
            continue
        log_probs, advantage = log_probs_of(model, sample.ids, sample.prompt_length), advantages[place]
        log_ratio = log_probs - old[place]
        if config.loss == "gspo":
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        elif config.level == "sequence_sum":
            log_ratio = log_ratio.sum().expand_as(log_ratio)
        ratio = log_ratio.exp()
        inside = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        if config.loss == "cispo":
            loss = -inside.detach() * advantage * log_probs
        elif config.loss == "sapo":
            tau = 1.0 if advantage > 0 else 1.05
            loss = -advantage * 4 / tau * torch.sigmoid(tau * (ratio - 1))
        else:
            loss = -torch.minimum(ratio * advantage, inside * advantage)
        weight = (old[place] - torch.tensor(sample.log_probs, dtype=torch.float64)).exp().clamp(max=2.0)
        losses[place] = loss * weight
        to_reference = reference[place] - log_probs
        divergences[place] = to_reference.exp() - to_reference - 1
        if config.weighted_divergence:
            divergences[place] = divergences[place] * ratio
    total = [losses[place] + (config.beta * divergences[place] if config.kl == "loss" else 0) for place in losses]
    lengths = {place: len(losses[place]) for place in losses}
    if config.aggregation == "token_mean":
        return torch.cat(total).mean()
    if config.aggregation == "constant":
        return torch.cat(total).sum() / (config.max_tokens * len(samples))
    if config.aggregation == "prompt_mean":
        groups = [[one for place, one in zip(losses, total, strict=True) if place // GROUP == number] for number in range(2)]
        return torch.stack([torch.cat(group).mean() for group in groups]).mean()
    assert lengths
    return torch.stack([one.mean() for one in total]).mean()


@pytest.mark.parametrize(("algorithm", "shared_row"), in_turn([*PRESETS, "grpo, weighted"], [None, 64]))
def test_loss_and_gradient_are_those_of_samples_alone_however_the_batch_is_cut(algorithm, shared_row, model, samples):
    name, _, is_weighted = algorithm.partition(", ")
    changes = {"beta": 0.1, "weighted_divergence": bool(is_weighted)}
    config = config_of(algorithm=name, **({} if "kl" in PRESETS[name] else changes))
    advantages = [1.0, -0.5, -0.5, 2.0, 0.0, -1.0]
    with torch.no_grad():
        own = [log_probs_of(model, sample.ids, sample.prompt_length) for sample in samples]
    old = [one + numbers(len(one), seed=10 + place) for place, one in enumerate(own)]
    reference = [one + numbers(len(one), seed=20 + place) for place, one in enumerate(own)]
    batch = batch_of(samples, advantages, old, reference, shared_row)
    assert batch.tokens_BT.shape[0] < len(samples), "several samples share a row"
    assert (batch.visible_to_BT is None) == (shared_row is None)
    objective = PolicyObjective.of(config)
    expected = plain_loss(model, samples, config, advantages, old, reference)
    gradient = torch.autograd.grad(expected, list(model.parameters()))
    for size in (1, 8):
        total, _ = in_micro_batches(objective, model, batch, size)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(total, list(model.parameters())), gradient, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_weighted_divergence_is_that_of_the_reverse_kl_divergence(model, samples):
    with torch.no_grad():
        own = [log_probs_of(model, sample.ids, sample.prompt_length) for sample in samples]
    reference = [one + numbers(len(one), seed=20 + place) for place, one in enumerate(own)]
    # on the policy itself, with advantages of 0: what is left is the divergence, Σ (log π − log π_ref) ∇ log π
    objective = PolicyObjective.of(config_of(beta=1.0, weighted_divergence=True, aggregation="constant"))
    total, _ = in_micro_batches(objective, model, batch_of(samples, [0.0] * 6, own, reference), 8)
    log_probs = [log_probs_of(model, sample.ids, sample.prompt_length) for sample in samples]
    expected = sum(
        ((one - of).detach() * one).sum() for one, of, kept in zip(log_probs, reference, KEPT, strict=True) if kept
    ) / (9 * 6)
    gradients = (torch.autograd.grad(each, list(model.parameters())) for each in (total, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert "weighted_divergence" not in config_of().output_settings()


def test_the_end_token_is_trained_and_prompt_padding_and_dropped_samples_are_not(samples):
    packed = pack_samples(samples, KEPT, 0)
    batch = packed.batch
    trained = sorted(batch.targets_BT[batch.targets_BT != IGNORE_INDEX].tolist())
    assert trained == sorted(id for sample, kept in zip(samples, KEPT, strict=True) if kept for id in sample.completion_ids)
    # at every place that is trained the sampler's log-probability stands
    sampled = batch.per_token["sampler_log_probs"]
    assert torch.equal(sampled != 0, batch.targets_BT != IGNORE_INDEX)
    one = pack_samples(samples[:1], [True], 0)
    assert one.batch.document_ids_BT is None and one.batch.targets_BT[0, -1] == samples[0].ids[-1]
    assert one.batch.per_token["sampler_log_probs"][0, -1] == pytest.approx(samples[0].log_probs[-1])


def test_a_temperature_in_the_sampler_alone_would_show(model, samples):
    with torch.no_grad():
        own = [log_probs_of(model, sample.ids, sample.prompt_length) for sample in samples]
    exact = [
        Sample(one.prompt, one.ids, one.prompt_length, found.tolist(), "", False)
        for one, found in zip(samples, own, strict=True)
    ]
    batch = batch_of(exact, [1.0] * 6, own, own)
    figures = {}
    for temperature in (TEMPERATURE, 1.0):
        objective = PolicyObjective.of(config_of(temperature=temperature))
        batch_without_old = type(batch)(**{**vars(batch), "per_token": {k: v for k, v in batch.per_token.items() if k != OLD}})
        _, (part,) = in_micro_batches(objective, model, batch_without_old, 8)
        figures[temperature] = float(part.metrics["log_ratio"].max)
    assert figures[TEMPERATURE] < 1e-5 and figures[1.0] > 0.1


def test_raw_log_ratios_are_told_before_truncation(model, samples):
    with torch.no_grad():
        own = [log_probs_of(model, sample.ids, sample.prompt_length) for sample in samples]
    shifted = [
        Sample(one.prompt, one.ids, one.prompt_length, (found - 2).tolist(), "", False)
        for one, found in zip(samples, own, strict=True)
    ]
    batch = batch_of(shifted, [1.0] * 6, own, own)
    _, (part,) = in_micro_batches(PolicyObjective.of(config_of()), model, batch, 8)
    figures = {name: float(metric.sum) / float(metric.count) for name, metric in part.metrics.items()}
    assert figures["log_ratio"] == pytest.approx(2, abs=1e-4) and float(part.metrics["log_ratio"].max) == pytest.approx(
        2, abs=1e-4
    )
    assert figures["log_ratio_over_cap"] == 1 and figures["kl"] == pytest.approx(0, abs=1e-6)
    # a little of each token is much of a whole answer
    shifted = [replace(one, log_probs=(found - 0.3).tolist()) for one, found in zip(samples, own, strict=True)]
    batch = batch_of(shifted, [1.0] * 6, own, own)
    for correction, share in (("truncate", 0.0), ("mask_sequence", 15 / 21), ("reject", 1.0)):
        _, (part,) = in_micro_batches(PolicyObjective.of(config_of(correction=correction)), model, batch, 8)
        over = part.metrics["log_ratio_over_cap"]
        assert float(over.sum) / float(over.count) == pytest.approx(share)
    _, (part,) = in_micro_batches(PolicyObjective.of(config_of(loss="reinforce")), model, batch, 8)
    assert "clip_share" not in part.metrics, "nothing is clipped"


@pytest.mark.parametrize(
    ("architecture", "backend"),
    in_turn(["dense", "experts", "latent", "learned positions"], ["sdpa", "explicit", "tiled"]),
)
def test_completions_that_share_a_prompt_are_as_those_by_themselves(architecture, backend):
    model = small_decoder(architecture).double()
    model.set_attention_backend(backend)
    assert model.config.shares_prefixes
    made = [random_sample(prompt, length) for prompt in (30, 12) for length in (1, 40, 3, 5, 60, 2, 7, 40)]
    results = {}
    for shared_row in (None, 1000):
        packed = pack_samples(made, [True] * len(made), 0, shared_row=shared_row)
        log_probs_BT = target_log_probs(model, model.hidden(**packed.batch.inputs), packed.batch.targets_BT)[0]
        gradients = torch.autograd.grad((log_probs_BT.tanh() * packed.batch.tokens_BT).sum(), list(model.parameters()))
        results[shared_row] = [packed.of_samples(packed.batch.sequence_sums(log_probs_BT)), *gradients]
    for shared, alone in zip(results[1000], results[None], strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", ["windows", "linear", "alibi"])
def test_models_that_read_distances_or_a_state_share_nothing(architecture):
    assert not small_decoder(architecture).config.shares_prefixes


def test_a_shared_prompt_is_in_a_row_once():
    made = [random_sample(20, 4, seed=seed) for seed in range(8)]
    batch = pack_samples(made, [True] * 8, 0, shared_row=64).batch
    # the prompt without its last token, and with it the completions without theirs
    assert batch.tokens_BT.shape == (1, 19 + 8 * 4) and batch.sequences == 8
    assert torch.equal(batch.visible_to_BT[0, :19], torch.full((19,), 8))
    assert torch.equal(batch.positions_BT[0, 19:].view(8, 4), torch.arange(19, 23).expand(8, 4))
    assert batch.targets_BT[0, 19:].tolist() == [id for sample in made for id in sample.completion_ids]
    # others begin with other tokens, and a long prompt comes again once a row is full
    mixed = [*made[:4], random_sample(21, 4), *(random_sample(200, 70, seed=seed) for seed in range(8))]
    packed = pack_samples(mixed, [True] * len(mixed), 0, shared_row=400)
    assert packed.batch.tokens_BT.shape[1] <= 400 and len(set(packed.rows_R[5:])) > 1
    for sample, row, column in zip(mixed, packed.rows_R, packed.columns_R, strict=True):
        own = (packed.batch.document_ids_BT[row] == column + 1) & (packed.batch.targets_BT[row] != IGNORE_INDEX)
        assert packed.batch.targets_BT[row][own].tolist() == sample.completion_ids


def random_sample(prompt, completion, seed=0):
    asked = torch.randint(4, 250, (prompt,), generator=torch.Generator().manual_seed(prompt))
    answered = torch.randint(4, 250, (completion,), generator=torch.Generator().manual_seed(seed + completion))
    return Sample(Prompt("?"), [*asked.tolist(), *answered.tolist()], prompt, [-1.0] * completion, "", False)
