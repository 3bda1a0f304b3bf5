"""The stage `distillation` on two processes, each with a shard of student and teacher: the student of one process."""

import pytest
import torch

from bessemer.core.metrics import read_metrics
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.distillation.config import DistillationConfig
from bessemer.posttraining.distillation.stage import distill

from ..posttraining.test_distillation import SETTINGS, data, teacher_folder  # noqa: F401
from ..training.conftest import documents, model_folder, tokenized  # noqa: F401


def taught(student, teacher, tokens, data, out, parallel, rows):  # noqa: F811
    out.mkdir(exist_ok=True)
    settings = {**SETTINGS, "steps": 3, "data": rows, "parallel": parallel, "next_token_weight": 0.2, "loss": "top_k"}
    config = DistillationConfig.parse(settings, "distillation")
    return distill(config, student, teacher, out, tokens=tokens, seed=3, device="cpu", folder=data)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [["chats.jsonl"], []], ids=["conversations", "text"])
def test_two_make_the_student_of_one(two, rows, model_folder, teacher_folder, tokenized, data, tmp_path):  # noqa: F811
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arguments = {"student": model_folder, "teacher": teacher_folder, "tokens": tokenized / "tokens", "data": data, "rows": rows}
    expected = taught(**arguments, out=tmp_path / "one", parallel={})
    torch.set_num_threads(threads)
    found = two.run(taught, **arguments, out=tmp_path / "two", parallel={"data_shard": 2})[0]
    names = ("validation_loss",) if rows else ("bits_per_byte", "teacher_bits_per_byte")
    for name in ("loss_distillation", *names):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    first, second = (load_model(tmp_path / place / "model").state_dict() for place in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


def on_policy(student, teacher, data, out, loss, parallel, adapter=None):  # noqa: F811
    out.mkdir(exist_ok=True)
    sampled = {"answers": "student", "loss": loss, "samples_per_prompt": 2, "sampling_temperature": 0.8, "evaluate_every": 1}
    settings = {**SETTINGS, "steps": 2, "data": ["prompts.jsonl"], "learning_rate": 1e-3, "adapter": adapter, **sampled}
    settings["parallel"] = parallel
    config = DistillationConfig.parse(settings, "distillation")
    return distill(config, student, teacher, out, seed=3, device="cpu", folder=data)


# by default `test_methods.py` has a teacher's loss on two ranks, and `test_rl.py` samples that two draw
@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "parallel", "adapter"),
    [
        ("policy_gradient", {"data_shard": 2}, None),
        ("reverse_kl", {"data_replicate": 2}, None),
        ("policy_gradient", {"data_shard": 2}, 4),
    ],
    ids=str,
)
def test_two_sample_and_learn_what_one_does(
    two,
    loss,
    parallel,
    adapter,
    model_folder,  # noqa: F811
    teacher_folder,  # noqa: F811
    data,  # noqa: F811
    tmp_path,
):
    # the student is the one that is sure: what it says, the other finds unlikely
    arguments = {"student": teacher_folder, "teacher": model_folder, "data": data, "loss": loss, "adapter": adapter}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    on_policy(**arguments, out=tmp_path / "one", parallel={})
    torch.set_num_threads(threads)
    two.run(on_policy, **arguments, out=tmp_path / "two", parallel=parallel)
    lines = [read_metrics(tmp_path / place / "metrics.jsonl") for place in ("one", "two")]
    sampled = ("completion_tokens", "cut_share")
    measured = ("loss", "validation_reverse_kl", *(("reverse_kl", "entropy") if loss == "policy_gradient" else ()))
    for first, second in zip(*lines, strict=True):
        assert [first[name] for name in sampled] == [second[name] for name in sampled]
        for name in measured:
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
    first, second = (load_model(tmp_path / place / "model").state_dict() for place in ("one", "two"))
    begun = load_model(teacher_folder).state_dict()
    for name, tensor in first.items():
        # by the tensor: AdamW moves a number whose gradient is all rounding as far as any other
        assert (second[name] - tensor).norm() <= 1e-3 * (tensor - begun[name]).norm(), name
