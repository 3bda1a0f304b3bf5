"""A model that several processes share answers as one process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from bessemer.core.errors import ConfigError, LostProcessError, RequestError
from bessemer.inference.engine import Capture, Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.kv_cache import block_bytes, layer_groups, state_bytes
from bessemer.inference.execution.tensor_parallel import sharded_model as worker_processes
from bessemer.inference.execution.tensor_parallel.sharded_model import Command, WorkerProcesses, device_of
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.storage.folder import save_model
from tests.cli.test_main import bessemer, one_error
from tests.distributed.pool import pool_of
from tests.inference.models import small_tokenizer
from tests.inference.sharded import decoder, shared
from tests.inference.test_identity import BLOCK, GIB, PARAMS, PROMPTS, assert_same_but_for_ties
from tests.inference.test_sharded_weights import other_weights
from tests.model.random_adapters import random_adapter
from tests.model.tokenizers import write_small_tokenizer

SHARED_EXPERT = {"shared_expert_intermediate_size": 16, "shared_expert_gate": True, "router_correction_bias": True}
FEW = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
#: Longer than two blocks of keys, to the end.
LONG = [list(range(40, 73)), [*range(40, 72), 99]]


two, four = pool_of(2, "module"), pool_of(4, "module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    save_model(decoder("dense"), folder / "model", tokenizer=write_small_tokenizer(folder / "tokenizer"))
    return folder / "model"


def answers(engine):
    """Greedy and sampled answers in one batch, twice each; then some that begin like those; and what became of the pages."""
    params = [PARAMS] * len(PROMPTS) + [
        SamplingParams(seed=seed, max_tokens=24, ignore_eos=True) for seed in range(len(PROMPTS))
    ]
    made = engine.generate(PROMPTS * 2, params)
    again = engine.generate(PROMPTS[3:], PARAMS)
    return made[: len(PROMPTS)] + again, made[len(PROMPTS) :], engine.core.scheduler.preemptions, again[0].cached_tokens


def few_pages(model, ranks=1):
    sizes = [block_bytes(model.config, group, BLOCK, torch.float32, ranks) for group in layer_groups(model.config)]
    states = 10.5 * state_bytes(model.config, torch.float32, ranks)
    return {"kv_memory": (20.5 * sum(sizes) + states) / GIB, "state_memory": states / GIB}


def free_pages(engine):
    """Pages of the group of layers, and the shape of those in a layer here."""
    return engine.core.scheduler.groups[0].pool.total, tuple(engine.core.runner.memory.layers[0].keys.shape)


def captured(engine):
    """The hidden states of prompts and their answers, and why there is no more of a shared model."""
    made = engine.generate(PROMPTS, FEW, capture=Capture(states=(0, 1, 2)))
    with pytest.raises(RequestError, match="hidden states only"):
        engine.capture(PROMPTS, Capture(attention=((0, 0),)))
    return [(one.token_ids, one.captured.states) for one in made]


def compare(pool, tokenizer, name, parallel, changes=None, settings=None, **options):
    """The same requests to an engine of one process and to one that the pool shares, both with few pages."""
    model, settings = decoder(name, changes), settings or {}
    one = Engine(model, tokenizer, config=EngineConfig(block_size=BLOCK, **few_pages(model) | settings))
    greedy, sampled, *_ = answers(one)
    more = few_pages(model, parallel.get("tensor", 1)) | settings
    found = pool.run(shared, use=answers, name=name, parallel=parallel, changes=changes, settings=more, **options)
    others_greedy, others_sampled, preemptions, cached = found[0]
    for first, second in zip(others_greedy, greedy, strict=True):
        assert_same_but_for_ties(first, second)
    assert [one.token_ids for one in others_sampled] == [one.token_ids for one in sampled]
    assert preemptions > 0 or None not in [group.window for group in layer_groups(model.config)]
    assert cached > 0
    return model, found[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("sharded"))


CASES = [
    ("dense", {"tensor": 2}, {}, {}),
    ("experts", {"expert": 2}, SHARED_EXPERT, {}),
]
MORE_CASES = [
    ("experts", {"tensor": 2}, SHARED_EXPERT, {}),
    ("dense", {"tensor": 2}, {}, {"batch_invariant": True}),
    ("dense", {"tensor": 2}, {"qk_norm": "full", "tie_word_embeddings": False}, {"speculation": {"method": "ngram"}}),
    ("windows", {"tensor": 2}, {"final_logit_softcapping": 4.0}, {}),
    ("latent", {"tensor": 2}, {}, {}),
    ("linear", {"tensor": 2}, {}, {"speculation": {"method": "ngram"}}),
    ("sinks and caps", {"tensor": 2}, {"attention_bias": True, "attention_output_bias": True}, {}),
    ("alibi", {"tensor": 2}, {}, {}),
    ("learned positions", {"tensor": 2}, {"mlp_bias": True}, {}),
    ("dense", {"tensor": 2}, {"num_nextn_predict_layers": 1}, {}),
]


@pytest.mark.parametrize(
    ("name", "parallel", "changes", "settings"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES]
)
def test_two_processes_answer_as_one(two, tokenizer, name, parallel, changes, settings):
    compare(two, tokenizer, name, parallel, changes, settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["windows", "alibi"])
def test_processes_that_share_a_model_read_pages_where_they_lie(two, tokenizer, name):
    compare(two, tokenizer, name, {"tensor": 2}, in_place=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parallel", "changes"),
    [
        ("experts", {"tensor": 2, "expert": 2}, {"num_experts": 8, **SHARED_EXPERT}),
        ("experts", {"expert": 4}, {"num_experts": 8, "expert_bias": True}),
        ("dense", {"tensor": 4}, {"num_key_value_heads": 4}),
    ],
)
def test_four_processes_answer_as_one(four, tokenizer, name, parallel, changes):
    compare(four, tokenizer, name, parallel, changes)


def test_each_process_keeps_the_pages_of_its_own_heads(two):
    settings = {"kv_memory": 0.001}
    (blocks, here), (there, *_) = two.run(shared, use=free_pages, name="dense", parallel={"tensor": 2}, settings=settings)
    assert here == there == (blocks, 1, BLOCK, 12)  # of two key-value heads one
    model = decoder("dense")
    assert blocks == int(0.001 * GIB) // block_bytes(model.config, layer_groups(model.config)[0], BLOCK, torch.float32, 2)


def test_of_a_latent_each_process_keeps_the_whole(two):
    (_, here), (there, *_) = two.run(shared, use=free_pages, name="latent", parallel={"tensor": 2})
    assert here[1:] == there[1:] == (1, BLOCK, 24)


@pytest.mark.parametrize("free", [[4 << 20, 9 << 20], [9 << 20, 4 << 20]])
def test_all_have_as_many_pages_as_the_one_with_least_memory(two, free):
    (blocks, _), (there, *_) = two.run(shared, use=free_pages, name="dense", parallel={"tensor": 2}, free=free)
    model = decoder("dense")
    each = block_bytes(model.config, layer_groups(model.config)[0], BLOCK, torch.float32, 2)
    assert blocks == there[0] == (4 << 20) // 4 // 2 // each  # a quarter of what is free, for two


# -- the processes


def processes(monkeypatch, script, ranks=2):
    """Workers that run a script in place of a model."""
    monkeypatch.setattr(worker_processes, "PROGRAM", (sys.executable, "-c", f"import os, pickle, sys, time\n{script}"))
    return WorkerProcesses(ranks, {}, threads=None)


READY = "print('\"ready\"', flush=True)\n"
READS = READY + "while True:\n  try: pickle.load(sys.stdin.buffer)\n  except EOFError: sys.exit()"


def test_workers_end_when_they_are_closed(monkeypatch):
    others = processes(monkeypatch, READS, ranks=3)
    others.wait_until_ready()
    with others.together():
        others.tell(Command("forward", (1,)))
    others.close()
    assert [process.returncode for process in others._processes] == [0, 0]
    assert others.failure is None
    with pytest.raises(LostProcessError, match="the engine is closed"), others.together():
        pass


def test_a_worker_that_does_not_end_is_killed(monkeypatch):
    others = processes(monkeypatch, READY + "time.sleep(60)")
    others.wait_until_ready()
    others.close(grace=0)
    assert [process.returncode for process in others._processes] == [-signal.SIGKILL]


def test_a_worker_that_dies_is_named_and_ends_the_others(monkeypatch):
    dies = "if not '\"rank\": 1' in sys.argv[1]: time.sleep(60)\npickle.load(sys.stdin.buffer); os.kill(os.getpid(), 9)"
    others = processes(monkeypatch, READY + dies, ranks=3)
    others.wait_until_ready()
    with pytest.raises(LostProcessError, match="process 1 of the model ended with signal 9"), others.together():
        others.tell(Command("forward", (1,)))
        raise RuntimeError("connection closed by peer")  # what the collective says
    assert [process.returncode for process in others._processes] == [-signal.SIGKILL] * 2
    with pytest.raises(LostProcessError, match="process 1 of the model ended with signal 9"), others.together():
        pass


def test_what_a_worker_finds_wrong_is_told(monkeypatch):
    others = processes(monkeypatch, "print('\"no such file\"', flush=True); sys.exit(2)")
    with pytest.raises(LostProcessError, match="process 1 of the model failed: no such file"):
        others.wait_until_ready()
    others.close()


def test_an_error_of_rank_0_ends_the_others(monkeypatch):
    monkeypatch.setattr(worker_processes, "_REPORT_SECONDS", 0.01)
    others = processes(monkeypatch, READS)
    others.wait_until_ready()
    with pytest.raises(LostProcessError, match="process 0 of the model failed: no memory"), others.together():
        raise RuntimeError("no memory")
    assert all(process.returncode is not None for process in others._processes)


def test_a_worker_ends_when_rank_0_is_gone_whatever_it_waits_for():
    script = (
        "import sys, threading; from bessemer.inference.execution.tensor_parallel import worker; "
        "worker.GRACE_SECONDS = 0.01; "
        "worker.read_commands(sys.stdin.buffer); threading.Event().wait(60)"
    )
    assert subprocess.run([sys.executable, "-c", script], input=b"", timeout=50).returncode == 1


@pytest.fixture(scope="module")
def opened(folder):
    with Engine(folder, device="cpu", config=EngineConfig(parallel={"tensor": 2})) as engine:
        yield engine


@pytest.mark.slow
def test_an_engine_starts_the_others_and_answers(opened, folder):
    assert opened.describe().startswith("640 KV blocks of 16 tokens, 0.00 GiB in float32 on each of 2 processes")
    alone = Engine(folder, device="cpu", config=EngineConfig(cpu_kernels="off"))
    assert opened.generate(PROMPTS, FEW) == alone.generate(PROMPTS, FEW)


def test_the_others_take_adapters_that_come_and_go(opened, folder):
    alone = Engine(folder, device="cpu", config=EngineConfig(cpu_kernels="off"))
    for engine in (opened, alone):
        engine.load_adapter("a", random_adapter(alone.model))
    expected = alone.generate(PROMPTS, FEW, adapter="a")
    assert opened.generate(PROMPTS, FEW, adapter="a") == expected != alone.generate(PROMPTS, FEW)
    opened.unload_adapter("a")
    assert opened.generate(PROMPTS, FEW) == alone.generate(PROMPTS, FEW)


def test_what_one_process_alone_can_do_is_refused(opened):
    with pytest.raises(ConfigError, match="give update_weights the whole tensors"):
        opened.update_weights()


def test_a_second_engine_in_the_same_process_is_refused(opened, folder):
    with pytest.raises(ConfigError, match="has such a model open"):
        Engine(folder, device="cpu", config=EngineConfig(parallel={"tensor": 2}))


def test_the_others_take_new_weights_or_none(opened, tokenizer):  # of this engine from here on
    other, params = other_weights("dense", {}), FEW.with_changes(temperature=0.7, top_p=0.9, seed=5)
    before = opened.generate(LONG, params)
    for wrong, message in (({"no.such": torch.zeros(1)}, "no weight"), ({"norm.weight": torch.zeros(1)}, "has shape")):
        with pytest.raises(RequestError, match=message):
            opened.update_weights({"embed_tokens.weight": other.embed_tokens.weight, **wrong})
    again = opened.generate(LONG, params)
    assert again == before and opened.weight_version == 0
    # the keys before are kept
    assert again[0].cached_tokens == 32
    opened.update_weights(dict(other.named_parameters()), version=3)
    alone = Engine(other, tokenizer, config=EngineConfig(cpu_kernels="off"))
    assert opened.generate(LONG, params) == alone.generate(LONG, params) != before
    assert opened.weight_version == 3


def test_when_a_worker_dies_every_answer_is_told_and_nothing_hangs(opened):  # the last of this engine
    stream = opened.stream([5], PARAMS.with_changes(logprobs=None, max_tokens=100))
    next(stream)
    (worker,) = opened._sharded.workers._processes
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(LostProcessError, match="process 1 of the model ended with signal 9; all stop"):
        list(stream)
    assert isinstance(opened.failure, LostProcessError)


# -- mistakes


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["tensor=3"], "tensor 3 does not divide num_attention_heads 4"),
        (["expert=2"], "expert 2, but the model has no experts"),
        (["tensr=2"], "--parallel tensr: unknown key 'tensr'; did you mean 'tensor'?"),
        (["tensor=two"], "--parallel tensor: input should be a valid integer"),
        (["tensor=0"], "--parallel tensor: input should be greater than or equal to 1"),
        (["tensor"], "--parallel tensor: give it as NAME=NUMBER"),
        (["tensor=2", "tensor=2"], "--parallel tensor=2: it is given twice"),
    ],
)
def test_a_mistake_is_one_line(capsys, folder, given, named):
    options = [part for one in given for part in ("--parallel", one)]
    code, _, err = bessemer(capsys, "generate", folder, "the", "--device", "cpu", *options)
    assert code == 2 and named in one_error(err)


def test_more_processes_than_cores_or_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("bessemer.inference.execution.tensor_parallel.sharded_model.usable_cores", lambda: 2)
    assert [device_of("cpu", rank, 2) for rank in range(2)] == [torch.device("cpu")] * 2
    with pytest.raises(ConfigError, match="4 processes, but this machine has 2 cores"):
        device_of("cpu", 0, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of("auto", rank, 2) for rank in range(2)] == [torch.device("cuda:0"), torch.device("cuda:1")]
    with pytest.raises(ConfigError, match="4 processes, but this machine has 2 GPUs"):
        device_of("cuda", 3, 4)
    with pytest.raises(ConfigError, match="a device of its own, and 'cuda:1' is one"):
        device_of("cuda:1", 0, 2)


def test_a_quantised_folder_is_refused(tmp_path):
    model = decoder("dense")
    quantise(model, QuantizeConfig(scheme="int8"))
    save_model(model, tmp_path / "model", tokenizer=write_small_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(ConfigError, match="is quantised, and codes are not cut"):
        Engine(tmp_path / "model", device="cpu", config=EngineConfig(parallel={"tensor": 2}))


@pytest.mark.parametrize("other", [{"cpu_kernels": "on"}, {"speculation": {"method": "mtp"}}])
def test_what_needs_a_whole_model_is_refused(other):
    with pytest.raises(ConfigError, match="do not go together"):
        EngineConfig.parse({"parallel": {"tensor": 2}} | other)


def test_a_model_in_memory_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="save it, and open its folder"):
        Engine(decoder("dense"), tokenizer, config=EngineConfig(parallel={"tensor": 2}))


def test_states_of_a_shared_model_are_captured_on_rank_0(two, tokenizer):
    one = Engine(decoder("dense"), tokenizer, config=EngineConfig(block_size=BLOCK))
    expected = one.generate(PROMPTS, FEW, capture=Capture(states=(0, 1, 2)))
    found, _ = two.run(shared, use=captured, name="dense", parallel={"tensor": 2})
    for (tokens, states), completion in zip(found, expected, strict=True):
        assert tokens == completion.token_ids
        for layer, states_PD in states.items():
            assert (states_PD - completion.captured.states[layer]).abs().max() < 1e-5
