"""Runs of the Tinker server: losses, gradients and steps are those of `transformers`, `peft` and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel

from bessemer.core.errors import ConfigError, RequestError
from bessemer.model.adapters.folder import write_adapter
from bessemer.model.device import check_dtype
from bessemer.posttraining.rl.losses import CISPO, CLIP, GSPO, IMPORTANCE, PolicyLossSettings, Sequences, policy_loss
from bessemer.serving.tinker.config import TrainingSettings
from bessemer.serving.tinker.losses import LOSSES, Values, batch_of
from bessemer.serving.tinker.training import AdamSettings, BaseModel, LoraSettings, TrainingRun
from bessemer.serving.tinker.wire import Datum
from bessemer.training.data.batch import Batch
from tests.model.family_models import make
from tests.model.tokenizers import write_small_tokenizer
from tests.serving.tinker_server import example, tiny_folder

GENERATOR = np.random.default_rng(0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model of `transformers`, and the folder that it lies in."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    model = make("llama")
    model.save_pretrained(folder)
    write_small_tokenizer(folder)
    return model.float(), folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return BaseModel(tiny_folder(tmp_path_factory.mktemp("tiny")), TrainingSettings(device="cpu"))


def random_examples(vocabulary, lengths=(9, 5, 12)):
    return [example(GENERATOR.integers(0, vocabulary, length), GENERATOR.uniform(-0.5, 1, length - 1)) for length in lengths]


def perturbed(run):
    """The run with numbers in both halves of its adapter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return run


def peft_twin(run, model, folder):
    """The same adapter in `peft`, and its parameters by our names."""
    write_adapter(run.adapter(), run.model, folder)
    theirs = PeftModel.from_pretrained(model, folder, is_trainable=True)
    names = {}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            layer = name.removeprefix("base_model.model.model.").partition(".lora_")[0]
            names[f"{layer}.adapter.{'down' if 'lora_A' in name else 'up'}"] = parameter
    return theirs, names


def their_loss(theirs, data):
    total = torch.zeros(())
    for datum in data:
        logits = theirs(torch.from_numpy(datum.tokens_T.copy())[None]).logits[0].float()
        targets = torch.from_numpy(datum.inputs["target_tokens"].copy())
        log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        total = total - (log_probs * torch.from_numpy(datum.inputs["weights"].copy())).sum()
    return total


def test_losses_gradients_and_steps_are_those_of_peft(llama, tmp_path):
    model, folder = llama
    run = perturbed(TrainingRun(BaseModel(folder, TrainingSettings(device="cpu", micro_batch_tokens=16)), LoraSettings(4, 1)))
    theirs, parameters = peft_twin(run, model, tmp_path / "adapter")
    assert set(parameters) == set(run.parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    for _ in range(3):
        # the gradients of two requests add up
        first, second = random_examples(model.config.vocab_size), random_examples(model.config.vocab_size, (7,))
        expected = [their_loss(theirs, data) for data in (first, second)]
        torch.stack(expected).sum().backward()
        found = [run.forward_backward(data, "cross_entropy").loss for data in (first, second)]
        np.testing.assert_allclose(found, [loss.item() for loss in expected], rtol=1e-4, atol=1e-4)
        for name, parameter in parameters.items():
            torch.testing.assert_close(run.parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-4)
            # an early step of Adam is a sign, which rounding may turn
            parameter.grad.copy_(run.parameters[name].grad)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        assert run.optim_step(AdamSettings(1e-2, 0.8, 0.9, 1e-8, 0.1, 1.0)) == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            torch.testing.assert_close(run.parameters[name].detach(), parameter.detach(), rtol=1e-5, atol=1e-6)


def test_forward_changes_no_gradient_and_gives_the_loss_of_forward_backward(base):
    run, data = perturbed(TrainingRun(base, LoraSettings(4, 1))), random_examples(200)
    forward = run.forward(data, "cross_entropy")
    assert all(parameter.grad is None for parameter in run.parameters.values())
    both = run.forward_backward(data, "cross_entropy")
    assert forward.loss == pytest.approx(both.loss, rel=1e-6)
    for one, other, datum in zip(forward.log_probs, both.log_probs, data, strict=True):
        assert one.shape == datum.inputs["target_tokens"].shape
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_examples_of_any_lengths_give_what_each_gives_alone(base):
    run, data = perturbed(TrainingRun(base, LoraSettings(4, 1))), random_examples(200, (3, 40, 8, 21))
    together = run.forward(data, "cross_entropy")
    alone = [run.forward([datum], "cross_entropy") for datum in data]
    assert together.loss == pytest.approx(sum(each.loss for each in alone), rel=1e-5)
    for found, each in zip(together.log_probs, alone, strict=True):
        np.testing.assert_allclose(found, each.log_probs[0], atol=1e-5)


def test_several_targets_of_a_token_are_each_what_it_is_alone(base):
    run = perturbed(TrainingRun(base, LoraSettings(4, 1)))
    (datum,) = random_examples(200, (10,))
    targets = np.stack([datum.inputs["target_tokens"], GENERATOR.integers(0, 200, 9)], 1)
    weights = GENERATOR.uniform(0, 1, (9, 2)).astype(np.float32)
    several = Datum(datum.tokens_T, {"target_tokens": targets, "weights": weights})
    found = run.forward_backward([several, datum], "cross_entropy")
    gradients = {name: parameter.grad.clone() for name, parameter in run.parameters.items()}
    run.optim_step(AdamSettings(0.0))
    columns = [Datum(datum.tokens_T, {"target_tokens": targets[:, place], "weights": weights[:, place]}) for place in range(2)]
    expected = run.forward_backward([*columns, datum], "cross_entropy")
    np.testing.assert_allclose(found.log_probs[0], np.stack(expected.log_probs[:2], 1), atol=1e-5)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, parameter in run.parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "theirs", "bounds"),
    [
        ("importance_sampling", IMPORTANCE, {}),
        ("ppo", CLIP, {"clip_low": 0.2, "clip_high": 0.2}),
        ("cispo", CISPO, {"clip_low": 0.2, "clip_high": 0.2}),
        ("gspo", GSPO, {"clip_low": 3e-4, "clip_high": 4e-4}),
    ],
)
def test_losses_of_policies_are_those_of_reinforcement_learning(name, theirs, bounds):
    torch.manual_seed(0)
    log_probs, sampled, advantages = -torch.rand(2, 6).double(), -torch.rand(2, 6).double(), torch.randn(2, 6).double()
    if name == "gspo":
        # one advantage of a sequence: the gradient of the geometric mean is spread over its tokens
        advantages = advantages[:, :1].expand(2, 6)
    ours, other = log_probs.clone().requires_grad_(), log_probs.clone().requires_grad_()
    values = Values({"logprobs": sampled, "advantages": advantages, "sequence_ratio_mask": torch.ones(2, 6).double()}, {})
    losses = LOSSES[name].function(ours, values)
    sequences = Sequences(Batch(torch.zeros(2, 6).long(), torch.zeros(2, 6).long()), torch.ones(2, 6).double())
    expected, _ = policy_loss(theirs, other, sampled, advantages, sequences, PolicyLossSettings(**bounds))
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), ours), torch.autograd.grad(expected.sum(), other))


def test_dro_and_bounds_of_single_tokens_are_their_formulas():
    log_probs, sampled, advantages = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]]), torch.tensor([[2.0, -1.0]])
    tensors = {"logprobs": sampled, "advantages": advantages}
    torch.testing.assert_close(
        LOSSES["dro"].function(log_probs, Values(tensors, {"beta": 0.4})),
        torch.tensor([[2.0 + 0.2 * 0.25, -2.0 + 0.2 * 1.0]]),
    )
    bounds = {"clip_low_threshold": torch.tensor([[0.0, 0.9]]), "clip_high_threshold": torch.tensor([[9.0, 1.1]])}
    # the first ratio is within its bounds, the second held at 0.9
    found = LOSSES["cispo"].function(log_probs, Values(tensors | bounds, {}))
    np.testing.assert_allclose(found, [[2.0 * np.exp(0.5), -0.9 * 2.0]], rtol=1e-6)


def test_runs_on_one_base_leave_each_other_and_the_base_alone(base):
    data = random_examples(200)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    first, second = (TrainingRun(base, LoraSettings(4, seed)) for seed in (1, 2))
    untrained = second.forward(data, "cross_entropy").loss
    for _ in range(2):
        first.forward_backward(data, "cross_entropy")
        first.optim_step(AdamSettings(1e-2))
    assert first.forward(data, "cross_entropy").loss < untrained - 0.1
    assert second.forward(data, "cross_entropy").loss == untrained
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
    assert first.model.embed_tokens.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()


def test_in_half_precision_the_base_is_half_as_large_and_the_adapter_whole(base):
    try:
        check_dtype("bfloat16", torch.device("cpu"))
    except ConfigError:
        pytest.skip("products in bfloat16 are refused on this processor")
    half = BaseModel(base.folder, TrainingSettings(device="cpu", dtype="bfloat16"))
    data = random_examples(200)
    exact, run = (perturbed(TrainingRun(each, LoraSettings(4, 1))) for each in (base, half))
    expected, found = (each.forward_backward(data, "cross_entropy") for each in (exact, run))
    assert found.loss == pytest.approx(expected.loss, rel=0.05) and found.loss != expected.loss
    assert {parameter.dtype for parameter in run.parameters.values()} == {torch.float32}
    assert half.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.served().parameters()} == {torch.bfloat16}
    run.optim_step(AdamSettings())


def test_a_run_that_loads_a_state_goes_on_bit_for_bit(base):
    batches = [random_examples(200) for _ in range(4)]

    def train(run, some):
        for data in some:
            run.forward_backward(data, "cross_entropy")
            run.optim_step(AdamSettings(1e-2))

    whole, first, resumed = (TrainingRun(base, LoraSettings(4, seed)) for seed in (1, 1, 9))
    train(whole, batches)
    train(first, batches[:2])
    resumed.load_state({name: tensor.clone() for name, tensor in first.state().items()}, steps=2, with_optimizer=True)
    train(resumed, batches[2:])
    assert resumed.steps == 4
    assert all(torch.equal(whole.parameters[name], parameter) for name, parameter in resumed.parameters.items())


@pytest.mark.parametrize("parts", [("train_attn",), ("train_mlp",)])
def test_a_run_trains_the_layers_that_the_client_asks_for(base, parts):
    asked = {name: name in parts for name in ("train_attn", "train_mlp")}
    names = TrainingRun(base, LoraSettings(2, 1, **asked)).parameters
    assert {("self_attn" in name, "mlp" in name) for name in names} == {("train_attn" in parts, "train_mlp" in parts)}


def test_a_step_without_gradients_or_with_bad_ones_changes_nothing(base):
    run = TrainingRun(base, LoraSettings(2, 1))
    with pytest.raises(RequestError, match="no gradients since the last step"):
        run.optim_step(AdamSettings())
    before = {name: tensor.clone() for name, tensor in run.state().items()}
    huge = example(range(5), [1e38] * 4)
    run.forward_backward([huge, huge], "cross_entropy")
    with pytest.raises(RequestError, match="they are dropped, and nothing is changed"):
        run.optim_step(AdamSettings())
    assert all(torch.equal(before[name], tensor) for name, tensor in run.state().items())


def test_mistakes_name_their_example_and_change_no_gradient(base):
    run = TrainingRun(base, LoraSettings(2, 1))
    good, tokens = example(range(6)), np.arange(5)
    short = Datum(tokens, {"target_tokens": np.arange(4)})
    rl = {"logprobs": np.zeros(5, np.float32)}
    cases = {
        ("cross_entropy", r"data\[1\]: target_tokens has the shape \(4,\)"): [good, short],
        ("cross_entropy", r"data\[0\]: cross_entropy needs target_tokens"): [Datum(tokens, {})],
        ("ppo", r"data\[0\]: ppo needs advantages"): [Datum(tokens, {"target_tokens": tokens, **rl})],
        ("cross_entropy", r"data\[0\]: model_input has an id that is none"): [example([1, 9999, 2])],
        ("cross_entropy", r"data\[0\]: cross_entropy has no use for 'logprobs'"): [
            Datum(tokens, {"target_tokens": tokens, **rl})
        ],
        ("cross_entropy", r"data\[0\]: 0 tokens"): [Datum(np.zeros(0, np.int64), {"target_tokens": np.zeros(0, np.int64)})],
        ("cross_entropy", "not finite"): [example(range(6), [np.nan] * 5)],
        ("cross_entropie", "did you mean 'cross_entropy'|'cross_entropy'"): [good],
        ("custom", "the client computes them"): [good],
        ("cross_entropy", "there is no example"): [],
    }
    for (loss, message), data in cases.items():
        with pytest.raises(RequestError, match=message):
            run.forward_backward(data, loss)
    with pytest.raises(RequestError, match=r"loss_fn_config\.beta: not a setting of ppo"):
        run.forward_backward([good], "ppo", {"beta": 1.0})
    assert all(parameter.grad is None for parameter in run.parameters.values())


def test_rows_are_filled_up_without_a_target_and_without_weight():
    batch = batch_of([example(range(4)), example(range(3))])
    assert batch.targets_BT.tolist() == [[1, 2, 3], [1, 2, -100]]
    assert batch.per_token["weights"].tolist() == [[1, 1, 1], [1, 1, 0]]
