"""Rewards of answers about pictures: what a batch of samples holds, that sampler and trainer see the same, and runs."""

import json
import shutil

import numpy as np
import pytest
import torch

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.metrics import read_metrics
from bessemer.model.vision.folder import load_vision_language
from bessemer.model.vision.trained import load_trained_decoder
from bessemer.posttraining.data.packing import placed
from bessemer.posttraining.data.picture_encoding import open_picture_encoder, picture_of
from bessemer.posttraining.data.picture_rows import sources_in
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.stage import gather_prompts, rl
from bessemer.posttraining.sampling import sampler as sampling
from bessemer.posttraining.sampling.samples import Sample, fitting_prompts, pack_samples
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.head import target_log_probs
from tests.model.picture_files import write_colours, write_qwen_model
from tests.model.tokenizers import write_small_tokenizer

SETTINGS = {
    "data": ["asked.jsonl"],
    "rewards": ["rewards.py:colour"],
    "steps": 2,
    "batch_size": 16,
    "group_size": 4,
    "max_tokens": 6,
    "context_length": 64,
    "learning_rate": 1e-2,
    "diagnostics_every": 0,
    "validation_share": 0.25,
    "threads": 1,
    "evaluate_every": 100,
}
#: Letters of the first half of the alphabet about red pictures, of the second half about blue ones. Of a blind policy the mean
#: over both colours is 0, whatever it writes.
REWARDS = """
def colour(completions, is_red, **kwargs):
    texts = [messages[-1]["content"].lower() for messages in completions]
    halves = ("abcdefghijkl", "mnopqrstuvwxyz")
    early, late = ([sum(letter in half for letter in text) for text in texts] for half in halves)
    return [(1 if red else -1) * (a - b) / max(a + b, 4) for a, b, red in zip(early, late, is_red)]
"""


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Pictures of two colours, each with the same question, and what an answer is worth."""
    folder = write_colours(tmp_path_factory.mktemp("asked"), even=False)
    rows = [
        {"images": [f"{number}.png"], "prompt": [{"role": "user", "content": "<image>which?"}], "is_red": number % 2 == 0}
        for number in range(64)
    ]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return folder


def run(colours, out, model="model", **changes):
    out.mkdir(parents=True, exist_ok=True)
    config = RLConfig.parse({**SETTINGS, **changes}, "rl")
    return rl(config, colours / model, out, seed=3, device="cpu", folder=colours)


@torch.no_grad()
@pytest.mark.parametrize("row", [None, 256])
def test_packed_samples_have_the_log_probabilities_of_each_alone(colours, tmp_path, row):
    tokenizer = load_tokenizer(colours / "model")
    pictures = open_picture_encoder(colours / "model", tokenizer, tmp_path / "pictures.bin")
    prompts = gather_prompts(RLConfig.parse(SETTINGS | {"validation_share": 0}, "rl"), colours, 1).training[:3]
    fitted = fitting_prompts(prompts, tokenizer, 60, pictures)
    # the tokens are the same, and the pictures are not
    assert fitted[0][1] == fitted[1][1] and len(fitted[0][1]) > len(fitted[0][0].pictures.asked)
    completions = [[20, 21, 22], [23, 24], [25, 26, 27, 28]]
    samples = [
        Sample(prompt, [*ids, *tokens], len(ids), [0.0] * len(tokens), "", False)
        for prompt, ids in fitted
        for tokens in completions
    ]
    packed = pack_samples(samples, [True] * 9, tokenizer.bos_id, shared_row=row)
    batch = placed(packed.batch, pictures)
    # a prompt that several answers share stands in a row once
    assert int((batch.vector_of_token_BT >= 0).sum()) == (36 if row is None else 12)
    decoder, whole = load_trained_decoder(colours / "model").eval(), load_vision_language(colours / "model")
    values_BT, _ = target_log_probs(decoder, decoder.hidden(**batch.inputs), batch.targets_BT)
    found_R = packed.of_samples(batch.sequence_sums(values_BT * (batch.targets_BT != IGNORE_INDEX)))
    alone = []
    for sample in samples:
        (source,) = sources_in(sample.prompt.turns)
        prepared = pictures.reader.preprocessor.prepare(picture_of(source, colours))
        logits = whole(torch.tensor([sample.ids]), pictures.reader.preprocessor.pixels(prepared))[0].log_softmax(-1)
        alone.append(sum(float(logits[place - 1, sample.ids[place]]) for place in sample.places))
    assert found_R.tolist() == pytest.approx(alone, abs=1e-4)
    assert len({round(value, 3) for value in alone}) == 9


@pytest.mark.usefixtures("one_thread")
def test_a_policy_learns_to_write_what_the_picture_is_rewarded_for(colours, tmp_path):
    summary = run(colours, tmp_path, steps=24, batch_size=32, learning_rate=5e-3, beta=1e-4)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert abs(summary["validation_reward_before"]) < 0.25
    assert summary["validation_reward"] > 0.6
    # the engine sampled by what the trainer computes
    assert max(line["log_ratio_max"] for line in lines) < 1e-4
    # before the first step the policy is its reference
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["kl"] > 1e-3
    assert read_metrics(tmp_path / "completions.jsonl")[0]["prompt"] == "user: [picture] which?"
    assert not (tmp_path / "pictures.bin").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_sampler_and_trainer_turn_the_tokens_of_pictures_alike(colours, tmp_path, beta):
    """Qwen2.5-VL's, whose positions are of three numbers."""
    shutil.copytree(colours, tmp_path / "asked")
    shutil.rmtree(tmp_path / "asked" / "model")
    write_qwen_model(tmp_path / "asked" / "model")
    run(tmp_path / "asked", tmp_path / "out", beta=beta, learning_rate=1e-3, dtype="float32", compile=False)
    assert max(line["log_ratio_max"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")) < 1e-4


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"rank": 4, "merge": True}},
        pytest.param({"pair_loss": "sigmoid", "beta": 0.1}, marks=pytest.mark.slow),
        pytest.param({"cpu_kernels": "off"}, marks=pytest.mark.slow),
    ],
)
def test_sampler_and_trainer_agree_in_other_ways_of_training(colours, tmp_path, changes):
    before = load_trained_decoder(colours / "model").state_dict()
    run(colours, tmp_path, **changes)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    if "pair_loss" in changes:
        assert lines[0]["margin"] == pytest.approx(0, abs=1e-6)
    else:
        assert max(line["log_ratio_max"] for line in lines) < 1e-4
    after = load_trained_decoder(tmp_path / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("layers.") or "adapter" not in changes for name in changed)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("changes", [{}, pytest.param({"adapter": {"rank": 4, "merge": True}}, marks=pytest.mark.slow)])
def test_on_a_card_a_copy_in_half_precision_sees_the_same_pictures(colours, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(sampling, "_COPYING_DEVICES", ("cpu",))
    # a card multiplies in half precision, whatever this processor does
    monkeypatch.setattr("bessemer.model.device.product_cost", lambda dtype, device: 1.0)
    run(colours, tmp_path, dtype="bfloat16", learning_rate=2e-2, **changes)
    # shown other pictures, the sampler is further off than 1.8 at once
    assert max(line["log_ratio_max"] for line in read_metrics(tmp_path / "metrics.jsonl")) < 0.4


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_that_was_cut_off_within_a_rollout_ends_with_the_same_weights(colours, tmp_path):
    changes = {"mini_batches": 2, "steps": 4, "checkpoint_every": 1}
    run(colours, tmp_path / "whole", **changes)
    run(colours, tmp_path / "cut", **changes)
    for name in ("model", "metrics.jsonl", *(f"checkpoints/step-{step:06d}" for step in (4,))):
        place = tmp_path / "cut" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    run(colours, tmp_path / "cut", **changes)
    own, other = (load_trained_decoder(tmp_path / name / "model").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_one_picture_lies_on_one_side_whatever_is_asked(colours):
    gathered = gather_prompts(RLConfig.parse(SETTINGS | {"data": ["asked.jsonl", "asked.jsonl"]}, "rl"), colours, 1)
    own, other = (
        {source for one in some for source in sources_in(one.turns)} for some in (gathered.training, gathered.held_out)
    )
    assert len(own) + len(other) == 64 and not own & other


def test_what_shows_no_pictures_refuses_them_in_one_line(colours, tmp_path):
    for changes, words in (
        ({"critic": {}, "advantage": "gae"}, "critic: prompts have pictures"),
        ({"bitwise_consistent": True}, "bitwise_consistent: prompts have pictures"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(colours, tmp_path / "refused", **changes)
    with pytest.raises(ConfigError, match="the policy reads pictures by whole weights"):
        run(colours, tmp_path / "rounded", sampler_weights="int8")
    text = tmp_path / "text"
    write_small_tokenizer(text)
    (text / "chat_template.jinja").write_text(CHAT_TEMPLATES["chatml"], encoding="utf-8")
    prompts = gather_prompts(RLConfig.parse(SETTINGS, "rl"), colours, 1).training
    with pytest.raises(SourceError, match=r"has no place for pictures|has pictures, and this model reads none"):
        fitting_prompts(prompts, load_tokenizer(text), 60)
    assert np.all([len(one.turns) == 1 for one in prompts])
