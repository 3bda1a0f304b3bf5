"""The real `trl`, on the same model and the same tokens: losses of pairs, KTO and reward models, in value and gradient."""

from __future__ import annotations

import importlib
import shutil

import pytest
import torch

from bessemer.model.storage.folder import load_model
from bessemer.posttraining.data.encoding import Encoded, encode_answer
from bessemer.posttraining.data.formats import Answered, Labelled, Pair
from bessemer.posttraining.data.packing import others_before, pack_answers, pack_pairs
from bessemer.posttraining.preference.config import PAIR_LOSSES
from bessemer.posttraining.preference.losses import PairLossSettings
from bessemer.posttraining.preference.objective import KTOObjective, PreferenceObjective
from bessemer.posttraining.rewards.stage import RewardObjective
from bessemer.training.model_roles import POLICY, REFERENCE, ModelRoles
from bessemer.training.model_setup import PreparedModel
from bessemer.training.objectives import LossContext
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from tests.posttraining.test_formats import said

pytestmark = pytest.mark.peer(name="trl")

#: Rows that a trainer of TRL's is built with; the batch that it computes is made from ours.
ROWS = [{"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "d", "chosen": " e", "rejected": " f"}]
TOLERANCE = 1e-5
#: Tokens of the tokenizer; the models know one more, which no text has.
VOCABULARY = 320


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory):
    """Tiny random models that `transformers` saved, with our tokenizer: a policy, its reference, and a reward model."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    found = {}
    for seed, (name, kind) in enumerate(
        {"policy": "LlamaForCausalLM", "reference": "LlamaForCausalLM", "reward": "LlamaForSequenceClassification"}.items()
    ):
        torch.manual_seed(seed)
        config.num_labels = 1 if name == "reward" else 2
        found[name] = tmp_path_factory.mktemp(name)
        getattr(transformers, kind)(config).save_pretrained(found[name])
        for path in model_folder.glob("*token*"):
            shutil.copy(path, found[name])
        for path in model_folder.glob("chat_template*"):
            shutil.copy(path, found[name])
    return found


@pytest.fixture(scope="module")
def pairs():
    texts = [Pair(f"Once {n} upon", f" a time {n * 7}", f" in {n}", margin=n / 3) for n in range(3)]
    messages = [
        Pair((said("user", "Why? " * (n % 3 + 1)),), (said("assistant", f"So {n}."),), (said("assistant", f"No {n} " * 3),))
        for n in range(3)
    ]
    return texts + messages


def trainer(kind, config_kind, folder, tmp_path, rows, reference=None, **settings):
    """A trainer of TRL's on a folder, in float32 on the processor; `kind` is `module:class`, of `trl` where none is named."""
    import datasets
    import transformers

    where, _, name = kind.rpartition(":")
    module = importlib.import_module(f"trl.{where}" if where else "trl")
    config = getattr(module, config_kind)(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=len(rows), **settings,
    )  # fmt: skip
    causal = name != "RewardTrainer"
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    models = {"model": auto.from_pretrained(folder)}
    if reference is not None:
        models["ref_model"] = auto.from_pretrained(reference)
    return getattr(module, name)(
        **models, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )


def tokens(prompt, answer, tokenizer):
    """(prompt, answer) as token ids, the answer's end token the last."""
    encoded = encode_answer(prompt, answer, tokenizer)
    start, end = int(encoded.is_learnt.argmax()), len(encoded.through_end())
    return encoded.ids[:start].tolist(), encoded.ids[start:end].tolist()


def of_trl(trainer, batch):
    """Loss and gradients by name, of a batch as TRL's collator makes it."""
    model = trainer.model.eval()
    model.zero_grad()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), {name.removeprefix("model."): weight.grad for name, weight in model.named_parameters()}


def of_ours(objective, model, batch, reference=None):
    """Loss and gradients by name, over two micro-batches."""
    runtime = Runtime.of(PretrainConfig(steps=1, dtype="float32", compile=False, threads=1), torch.device("cpu"))
    frozen = {} if reference is None else {REFERENCE: PreparedModel(reference, None)}
    with torch.no_grad():
        batch = objective.annotate(ModelRoles({POLICY: PreparedModel(model, None)}, runtime, frozen=frozen), batch)
    counts = objective.denominators(batch)
    assert batch.tokens_BT.shape[0] > 1
    parts = [objective(model, batch.rows(rows), LossContext()) for rows in (slice(0, 1), slice(1, None))]
    total = sum(part.sums[term] / counts[term].value for part in parts for term in part.sums)
    total.backward()
    return total.item(), {name: weight.grad for name, weight in model.named_parameters()}


def assert_equal(ours, theirs):
    (loss, gradients), (expected, expected_gradients) = ours, theirs
    assert loss == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    assert largest > 1e-4
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=TOLERANCE * max(largest, 1), msg=name)


def preference_batch(pairs, tokenizer, collator):
    rows = []
    for pair in pairs:
        (prompt, chosen), (_, rejected) = (tokens(pair.prompt, side, tokenizer) for side in (pair.chosen, pair.rejected))
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return collator(rows)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sppo_hard"])
def test_losses_of_pairs_with_a_reference(name, folders, pairs, tokenizer, tmp_path):
    settings = {"beta": 0.3, **({"label_smoothing": 0.1} if name == "robust" else {})}
    theirs = trainer(
        "DPOTrainer", "DPOConfig", folders["policy"], tmp_path, ROWS, folders["reference"], loss_type=[name], **settings
    )  # fmt: skip
    expected = of_trl(theirs, preference_batch(pairs, tokenizer, theirs.data_collator))
    objective = PreferenceObjective(PAIR_LOSSES[name].load(), PairLossSettings(**settings))
    batch = pack_pairs(pairs, tokenizer, 128).batch
    assert_equal(of_ours(objective, load_model(folders["policy"]), batch, load_model(folders["reference"])), expected)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_of_pairs_without_a_reference(name, folders, pairs, tokenizer, tmp_path):
    kinds, settings = {
        "simpo": (("experimental.cpo:CPOTrainer", "CPOConfig"), {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0}),
        "orpo": (("experimental.orpo:ORPOTrainer", "ORPOConfig"), {}),
    }[name]
    theirs = trainer(*kinds, folders["policy"], tmp_path, ROWS, beta=0.3, **settings)
    batch = {}
    for side in ("chosen", "rejected"):
        split = [tokens(pair.prompt, getattr(pair, side), tokenizer) for pair in pairs]
        ids = [torch.tensor(prompt + answer) for prompt, answer in split]
        labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in split]
        for what, values, filling in (
            ("input_ids", ids, 1),
            ("attention_mask", [torch.ones_like(one) for one in ids], 0),
            ("labels", labels, -100),
        ):
            batch[f"{side}_{what}"] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filling)
    expected = of_trl(theirs, batch)
    objective = PreferenceObjective(PAIR_LOSSES[name].load(), PairLossSettings(beta=0.3, margin=0.7))
    assert_equal(of_ours(objective, load_model(folders["policy"]), pack_pairs(pairs, tokenizer, 128).batch), expected)


def test_kto(folders, pairs, tokenizer, tmp_path):
    """The two models change places: so the divergence is above zero."""
    # an answer in messages cannot be put behind a prompt that is a text
    examples = [
        Labelled(Answered(pair.prompt, answer), n % 3 == 0)
        for n, pair in enumerate(pairs)
        for answer in (pair.chosen, pair.rejected)
        if not isinstance(pair.prompt, str)
    ]
    weights = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    rows = [{"prompt": one["prompt"], "completion": one["chosen"], "label": n == 0} for n, one in enumerate(ROWS)]
    theirs = trainer("KTOTrainer", "KTOConfig", folders["reference"], tmp_path, rows, folders["policy"], **weights)
    given = []
    for example, place in zip(examples, others_before([str(one.answered.prompt) for one in examples]), strict=True):
        prompt, answer = tokens(example.answered.prompt, example.answered.answer, tokenizer)
        _, other = tokens(example.answered.prompt, examples[place].answered.answer, tokenizer)
        given.append(
            {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": example.is_desirable}
        )
    expected = of_trl(theirs, theirs.data_collator(given))
    packed = pack_answers(examples, tokenizer, 64)
    objective = KTOObjective(*weights.values())
    assert_equal(of_ours(objective, load_model(folders["reference"]), packed.batch, load_model(folders["policy"])), expected)
    assert theirs._metrics["eval"]["kl"][0] > 0.01, "where z is cut to zero this test does not see it"


def test_reward_models(folders, pairs, tokenizer, tmp_path):
    rows = [{key: one[key] for key in ("prompt", "chosen", "rejected")} for one in ROWS]
    theirs = trainer("RewardTrainer", "RewardConfig", folders["reward"], tmp_path, rows, center_rewards_coefficient=0.2)
    given = []
    for pair in pairs:
        sides = [tokens(pair.prompt, side, tokenizer) for side in (pair.chosen, pair.rejected)]
        chosen, rejected = (prompt + answer for prompt, answer in sides)
        given.append({"chosen_ids": chosen, "rejected_ids": rejected, "margin": pair.margin})
    # TRL finds the end of an answer as the last token that is no padding, and would pass over an end token that pads too
    theirs.model.config.pad_token_id = theirs.data_collator.pad_token_id = VOCABULARY
    expected = of_trl(theirs, theirs.data_collator(given))
    model = load_model(folders["reward"], scores=True)
    batch = pack_pairs(pairs, tokenizer, 128, example=Encoded.scored).batch
    assert_equal(of_ours(RewardObjective(centering=0.2), model, batch), expected)
