"""A reference, a critic, a teacher and the trial before a run are read by shards: no process holds a whole model."""

import json

import pytest
import torch

from bessemer.core.progress import Silent
from bessemer.distributed.layout import ParallelConfig
from bessemer.distributed.mesh import Mesh, local
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage import folder as model_folders
from bessemer.model.storage.folder import load_model, load_scorer, save_model
from bessemer.posttraining.distillation.config import DistillationConfig
from bessemer.posttraining.distillation.objective import TeacherHead
from bessemer.posttraining.distillation.stage import distill
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.stage import preference
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.stage import rl
from bessemer.training.autotune import prepare_run
from bessemer.training.config import LoopConfig
from bessemer.training.model_setup import prepare_model
from bessemer.training.runtime import Runtime
from bessemer.training.starting_model import open_beside
from tests.cases import slow, slow_but

from ..training.conftest import documents, model_folder, tokenized  # noqa: F401
from .parity import DENSE, SETTINGS

STAGES = {
    "preference": (preference, PreferenceConfig, {"context_length": 128, "data": ["pairs.jsonl"]}),
    "rl": (
        rl,
        RLConfig,
        {
            "algorithm": "ppo",
            "data": ["prompts.jsonl"],
            "rewards": ["rewards.py:letters"],
            "max_tokens": 4,
            "context_length": 64,
        },
    ),
    "distillation": (distill, DistillationConfig, {"loss": "forward_kl", "data": ["pairs.jsonl"], "context_length": 128}),
    # what is measured before the first step, of a reward model
    "autotune": (None, PreferenceConfig, {"context_length": 64, "data": ["pairs.jsonl"], "dtype": "auto"}),
}


def refused(*arguments, **options):
    raise AssertionError("a process reads the whole model")


def run(stage, model, teacher, data, out):
    """The stage on this process, in which reading a whole model is an error."""
    function, kind, own = STAGES[stage]
    common = {
        "steps": 1,
        "batch_size": 2,
        "dtype": "float32",
        "compile": False,
        "threads": 1,
        "diagnostics_every": 0,
        "validation_share": 0,
        "parallel": {"data_shard": 2},
    }
    config = kind.parse({**common, **own}, stage)
    options = {"device": "cpu", "progress": Silent(), "folder": data}
    whole, model_folders.read_weights = model_folders.read_weights, refused
    try:
        if function is None:
            prepare_run(config, model, out, **options)
        elif stage == "distillation":
            function(config, model, teacher, out, seed=3, **options)
        else:
            function(config, model, out, seed=3, **options)
    finally:
        model_folders.read_weights = whole


@pytest.fixture
def data(tmp_path):
    pairs = [
        {"prompt": f"Say {number}.", "chosen": f"YES {number}", "rejected": "no", "completion": "yes"} for number in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {number}"}) + "\n" for number in range(8)), encoding="utf-8"
    )
    (tmp_path / "rewards.py").write_text(
        "def letters(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n", encoding="utf-8"
    )
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("stage", slow_but({"rl"}, STAGES))
def test_no_process_of_two_reads_a_whole_model(two, model_folder, data, stage):  # noqa: F811
    out = data / "out"
    out.mkdir()
    two.run(run, stage=stage, model=model_folder, teacher=model_folder, data=data, out=out)


def shards_of(folder, parallel, seed_of_head):
    """The tensors of a model beside the policy that this process holds, those of a whole model cut alike, and the bytes of the
    first."""
    mesh = Mesh.here(ParallelConfig(**parallel), "cpu")
    config = LoopConfig.parse({**SETTINGS, "parallel": parallel})
    runtime = Runtime.of(config, torch.device("cpu"))
    opened = open_beside(folder, "cpu", mesh, seed_of_head=seed_of_head)
    assert opened.load is not None and all(weight.is_meta for weight in opened.decoder.parameters())
    prepared = prepare_model(opened.decoder, config, runtime, mesh)
    opened.load(prepared)
    if seed_of_head is None:
        whole = load_model(folder, dtype=torch.float32)
    else:
        whole = load_scorer(folder, dtype=torch.float32, seed=seed_of_head)
    cut = prepare_model(whole, config, runtime, mesh)
    found, wanted = (
        {name: local(weight.detach()) for part in one.parts for name, weight in part.named_parameters()}
        for one in (prepared, cut)
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    return sum(weight.nbytes for weight in found.values())


@pytest.mark.parametrize(
    ("seed_of_head", "parallel"),
    [(None, {"data_shard": 2}), (5, {"tensor": 2}), slow(None, {"tensor": 2}), slow(5, {"data_shard": 2})],
    ids=lambda value: str(value) if isinstance(value, dict) else "critic" if value else "reference",
)
def test_shards_of_a_model_beside_the_policy_are_those_of_the_whole_one(two, tmp_path, parallel, seed_of_head):
    save_model(initial_decoder(ModelConfig(**DENSE), seed=3).to(torch.bfloat16), tmp_path / "model", tokenizer=None)
    held = two.run(shards_of, folder=tmp_path / "model", parallel=parallel, seed_of_head=seed_of_head)
    whole = sum(4 * weight.numel() for weight in load_model(tmp_path / "model").parameters())
    assert max(held) <= 0.55 * whole


@pytest.mark.parametrize("tied", [False, True])
def test_a_teachers_head_is_read_without_the_rest_of_it(tmp_path, tied):
    decoder = initial_decoder(ModelConfig(**DENSE | {"tie_word_embeddings": tied}), seed=3).to(torch.bfloat16)
    save_model(decoder, tmp_path / "model", tokenizer=None, shard_bytes=20_000)
    found = TeacherHead.read(tmp_path / "model", "cpu")
    assert found.weight_VD.dtype == torch.float32 and found.softcap == decoder.logit_softcap
    assert torch.equal(found.weight_VD, decoder.head_weight.float())
