"""The stage `distillation` on small models: text, the teacher's answers, the student's own, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from bessemer.core.errors import ArtefactError, BessemerError, ConfigError, SourceError
from bessemer.core.metrics import read_metrics
from bessemer.core.report import StageReport
from bessemer.inference.engine import Engine, EngineConfig
from bessemer.model.config import ModelConfig, ModelStageConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.stage import build_model
from bessemer.model.storage.folder import load_model, save_model
from bessemer.pipeline.recipe import load_recipe
from bessemer.posttraining.data.examples import read_conversations
from bessemer.posttraining.distillation import answers as teacher_answers
from bessemer.posttraining.distillation import specs as report
from bessemer.posttraining.distillation.answers import ANSWERS, TeacherAnswer, prompt_of
from bessemer.posttraining.distillation.config import DistillationConfig, TeacherServerConfig
from bessemer.posttraining.distillation.objective import teacher_fingerprint
from bessemer.posttraining.distillation.stage import distill
from bessemer.posttraining.distillation.teacher_server import TeacherServer
from bessemer.posttraining.sampling.samples import Prompt
from bessemer.posttraining.specs import STAGES
from tests import chat_server
from tests.cases import slow
from tests.inference.models import small_decoder
from tests.model.tokenizers import write_small_tokenizer
from tests.posttraining.test_formats import said
from tests.serving.running import servers
from tests.training.conftest import TINY, RecordedProgress

SETTINGS = {
    "steps": 4,
    "batch_size": 8,
    "context_length": 64,
    "max_tokens": 8,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "compile": False,
    "threads": 1,
    "diagnostics_every": 0,
    "evaluate_every": 100,
    "validation_share": 0.25,
    "evaluate_tokens": 300,
}
SPEC = next(spec for spec in STAGES if spec.kind == "distillation")


@pytest.fixture(scope="module")
def teacher_folder(tokenized, tmp_path_factory):
    """A wider model of the same tokenizer that is sure of what it says: mostly the token that it just read."""
    out = tmp_path_factory.mktemp("teacher")
    build_model(ModelStageConfig.parse({**TINY, "hidden_size": 48}), tokenized / "tokenizer", out, seed=5)
    model = load_model(out / "model")
    with torch.no_grad():
        model.norm.weight.mul_(5.0)
    save_model(model, out / "sure", tokenizer=out / "model")
    return out / "sure"


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """A teacher with a tokenizer of its own."""
    out = tmp_path_factory.mktemp("other")
    save_model(small_decoder("dense"), out / "model", tokenizer=write_small_tokenizer(out / "tokenizer"))
    return out / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    words = ["table", "graph", "node", "edge", "matrix", "vector", "layer", "cache"]
    prompts = [{"prompt": f"Return the {a} of {b}"} for a in words for b in words[:3]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    chats = [{"messages": [said("user", f"{a}?"), said("assistant", f"A {a}.")]} for a in words for _ in range(2)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    return folder


def run(student, teacher, folder, out, *, tokens=None, progress=None, **changes):
    out.mkdir(exist_ok=True)
    config = DistillationConfig.parse({**SETTINGS, **changes}, "distillation")
    return distill(config, student, teacher, out, tokens=tokens, seed=3, device="cpu", folder=folder, progress=progress)


def is_equal(first, second):
    own, other = (load_file(place / "model" / "model.safetensors") for place in (first, second))
    return all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.usefixtures("one_thread")
def test_on_text_a_student_comes_nearer_to_its_teacher_and_the_report_shows_both(
    model_folder, teacher_folder, tokenized, tmp_path
):
    summary = run(
        model_folder,
        teacher_folder,
        tmp_path,
        tmp_path,
        tokens=tokenized / "tokens",
        steps=20,
        evaluate_every=10,
        next_token_weight=0.1,
    )
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["loss_distillation"] < 0.6 * lines[0]["loss_distillation"]
    assert [line["step"] for line in lines if "bits_per_byte" in line] == [10, 20]
    assert summary["teacher_bits_per_byte"] == lines[9]["teacher_bits_per_byte"] != summary["bits_per_byte"]
    stage = StageReport(name="distillation", kind="distillation", metrics=summary, folder=tmp_path, records=lines)
    assert "Bits per byte" in repr(report.report(stage).parts) and "the teacher's" in report.summary_line(summary)


@pytest.mark.usefixtures("one_thread")
def test_a_limit_of_time_leaves_as_many_steps_as_fit(model_folder, teacher_folder, data, tmp_path):
    settings = {"data": ["prompts.jsonl"], "answers": "student", "loss": "policy_gradient", "batch_size": 8}
    summary = run(teacher_folder, model_folder, data, tmp_path, steps=100_000, minutes=1 / 120, **settings)
    assert 1 <= summary["steps"] < 10_000
    measured = json.loads((tmp_path / "autotune.json").read_text(encoding="utf-8"))["measured"]
    assert (measured["steps"], measured["planned_steps"]) == (summary["steps"], 100_000)


@pytest.mark.usefixtures("one_thread")
def test_a_student_that_trains_an_adapter_answers_with_it(model_folder, teacher_folder, data, tmp_path):
    settings = {"data": ["prompts.jsonl"], "answers": "student", "loss": "policy_gradient", "sampling_temperature": 0.8}
    run(teacher_folder, model_folder, data, tmp_path, steps=4, batch_size=16, learning_rate=2e-2, adapter=4, **settings)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert max(line["log_ratio_max"] for line in lines) < 1e-4 and lines[-1]["reverse_kl"] < lines[0]["reverse_kl"]
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    # with its adapter the student is also compared on what is held out
    assert lines[-1]["validation_reverse_kl"] > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("loss", ["policy_gradient", slow("reverse_kl"), slow("jsd"), slow("top_k")])
def test_on_its_own_answers_a_student_comes_nearer_to_its_teacher(loss, model_folder, teacher_folder, data, tmp_path):
    # a student that is too sure, and a teacher that is not
    summary = run(
        teacher_folder,
        model_folder,
        data,
        tmp_path,
        data=["prompts.jsonl"],
        answers="student",
        loss=loss,
        steps=12,
        batch_size=32,
        samples_per_prompt=2,
        learning_rate=2e-3,
        sampling_temperature=0.8,
        evaluate_every=1,
    )
    lines = read_metrics(tmp_path / "metrics.jsonl")
    held_out = [line["validation_reverse_kl"] for line in lines if "validation_reverse_kl" in line]
    assert len(held_out) == 12 and held_out[-1] < 0.2 * held_out[0], held_out
    assert all(line["tokens"] > 0 and line["completion_tokens"] <= 8 for line in lines)
    if loss == "policy_gradient":
        # trainer and sampler agree at another temperature than 1
        assert max(line["log_ratio_max"] for line in lines) < 1e-4 and lines[-1]["reverse_kl"] < lines[0]["reverse_kl"]
    assert "on the student's own answers" in repr(
        report.report(StageReport(name="own", kind="distillation", metrics=summary, folder=tmp_path, records=lines)).parts
    )


@pytest.fixture
def start():
    with servers() as started:
        yield started


def serving(folder):
    return Engine(folder, device="cpu", config=EngineConfig(threads=1, max_num_seqs=16))


@pytest.mark.usefixtures("one_thread")
def test_a_teacher_behind_a_server_teaches_as_its_folder_does(model_folder, teacher_folder, data, tmp_path, start):
    settings = {"data": ["prompts.jsonl"], "answers": "student", "loss": "policy_gradient", "samples_per_prompt": 2}
    # the student is the one that is sure
    run(teacher_folder, model_folder, data, tmp_path / "folder", **settings)
    url = start(serving(model_folder))
    summary = run(teacher_folder, None, data, tmp_path / "server", teacher_server=f"{url}/v1", **settings)
    assert "validation_reverse_kl" not in summary
    for first, second in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("folder", "server")), strict=True):
        assert second["reverse_kl"] == pytest.approx(first["reverse_kl"], rel=1e-4) and second["teacher_seconds"] > 0
        assert second["completion_tokens"] == first["completion_tokens"]


@pytest.mark.parametrize(
    ("tokens", "values", "message"),
    [
        (["x"] * 4, [None, -1.0, -2.0, -3.0], r"teacher_server: the teacher has another vocabulary than the student: 4 of 4"),
        (["R"] * 2, [None, -1.0], r"scores 2 tokens of 4 that were sent"),
        (None, None, r"gives no log-probabilities of a prompt"),
    ],
    ids=["vocabulary", "too few", "no scores"],
)
def test_a_server_that_is_no_teacher_of_this_student_is_refused(tokenizer, monkeypatch, tokens, values, message):
    log_probs = None if tokens is None else {"tokens": tokens, "token_logprobs": values}
    answer = 200, {}, json.dumps({"choices": [{"text": "", "logprobs": log_probs}]}).encode()
    with chat_server.serving(monkeypatch) as started:
        server = started(lambda body, number: answer)
        teacher = TeacherServer(TeacherServerConfig(url=server.url, model="m"), tokenizer)
        with pytest.raises(BessemerError, match=message):
            teacher.log_probs([tokenizer.encode("RRRR")[-4:]])
        assert server.requests[0][0] == "/v1/completions" and server.requests[0][2]["max_tokens"] == 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"answers": "student", "loss": "policy_gradient", "batch_size": 4}, id="student"),
        slow({"answers": "student", "loss": "reverse_kl"}, id="student, whole distributions"),
        slow({"data": ["chats.jsonl"]}, id="data"),
        slow({"data": []}, id="text"),
    ],
)
def test_a_run_goes_on_bit_for_bit_where_it_stopped(changes, model_folder, teacher_folder, tokenized, data, tmp_path):
    settings = {"data": ["prompts.jsonl"], "checkpoint_every": 2, "tokens": tokenized / "tokens", **changes}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(model_folder, teacher_folder, data, whole, **settings)
    # what an interruption after the second step leaves
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    for path in (cut / "checkpoints").glob("*4*"):
        shutil.rmtree(path)
    run(model_folder, teacher_folder, data, cut, **settings)
    assert is_equal(whole, cut)
    losses = [[line["loss"] for line in read_metrics(out / "metrics.jsonl")] for out in (whole, cut)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


@pytest.mark.usefixtures("one_thread")
def test_a_teacher_of_another_tokenizer_is_learnt_from_by_its_words(model_folder, other_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_answers, "_PROMPTS_AT_ONCE", 8)
    settings = {"data": ["prompts.jsonl"], "answers": "teacher", "loss": "cross_entropy", "samples_per_prompt": 2}
    out = tmp_path / "out"
    summary = run(model_folder, other_folder, data, out, **settings)
    assert summary["answers"] > 24 and "validation_reverse_kl" not in summary and summary["validation_loss"] > 0
    sampled = (out / ANSWERS).read_text(encoding="utf-8")
    assert len(sampled.splitlines()) == 25, "what the rows are of, and a row of each prompt"
    # what an interruption in the midst of the second lot leaves
    (out / ANSWERS).write_text("\n".join(sampled.splitlines()[:11]) + '\n{"prompt": "Re', encoding="utf-8")
    shutil.rmtree(out / "checkpoints")
    run(model_folder, other_folder, data, out, **settings)
    assert (out / ANSWERS).read_text(encoding="utf-8") == sampled
    ended = sum(not answer["cut"] for line in sampled.splitlines()[1:] for answer in json.loads(line)["answers"])
    written = [
        (out / "conversations" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        for name in ("train", "validation")
    ]
    assert sum(map(len, written)) <= ended
    with pytest.raises(ArtefactError, match=r"teacher_answers\.jsonl: its rows were made with other settings or data"):
        run(model_folder, other_folder, data, out, **settings, max_tokens=9)
    with pytest.raises(ConfigError, match=r"another vocabulary than the model.* answers: teacher and loss: cross_entropy"):
        run(model_folder, other_folder, data, tmp_path / "refused", **{**settings, "loss": "forward_kl"})


@pytest.mark.usefixtures("one_thread")
def test_the_answers_of_conversations_are_learnt_from_and_the_student_is_compared_on_its_own(
    model_folder, teacher_folder, data, tmp_path
):
    progress = RecordedProgress()
    summary = run(model_folder, teacher_folder, data, tmp_path, data=["chats.jsonl"], progress=progress, loss="jsd")
    assert summary["rows"] > 0 and summary["validation_loss"] > 0 and summary["validation_reverse_kl"] > 0


@pytest.mark.parametrize("prompt", ["Return the table", (said("user", "Which table?"),)], ids=["text", "messages"])
def test_of_an_answer_that_was_cut_the_end_is_no_target(prompt, tokenizer):
    whole, cut = (TeacherAnswer(Prompt(prompt), "of nodes", is_cut).encoded(tokenizer) for is_cut in (False, True))
    learnt = [targets[targets >= 0].tolist() for _, targets in (whole.example(64), cut.example(64))]
    assert learnt[0][:-1] == learnt[1] and learnt[0][-1] in {*tokenizer.eos_ids, tokenizer.control_id("<|im_end|>")}
    assert tokenizer.decode(learnt[1]) == "of nodes"


def test_what_ended_is_written_as_sft_reads_it(tmp_path):
    rows = [TeacherAnswer(Prompt(prompt), "Yes.", False).conversation.record for prompt in ("So", (said("user", "So?"),))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, second = read_conversations(tmp_path / "rows.jsonl")
    assert (first.answered.prompt, first.answered.answer) == ("So", "Yes.")
    assert [message["role"] for message in second.messages] == ["user", "assistant"]


def test_a_prompt_is_what_stands_before_the_last_answer():
    chat = [said("system", "Short."), said("user", "A?"), said("assistant", "B"), said("user", "C?"), said("assistant", "D")]
    assert [message["content"] for message in prompt_of({"messages": chat}).turns] == ["Short.", "A?", "B", "C?"]
    assert prompt_of({"prompt": "Once"}).turns == prompt_of({"prompt": "Once", "completion": " more"}).turns == "Once"
    with pytest.raises(ValueError, match="there is no prompt to answer"):
        prompt_of({"messages": [said("assistant", "Hello.")]})
    with pytest.raises(ValueError, match="prompt: it ends with the assistant"):
        prompt_of({"prompt": chat})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "foward_kl"}, r"there is no distillation loss 'foward_kl'; did you mean 'forward_kl'"),
        ({"answers": "student"}, r"answers: student needs prompts"),
        ({"loss": "cross_entropy"}, r"of the teacher's answers: set answers: teacher; of other data it is sft"),
        ({"loss": "policy_gradient"}, r"of the student's own answers: set answers: student"),
        ({"data": ["p.jsonl"], "answers": "student", "next_token_weight": 0.5}, r"own answers are no targets to imitate"),
        ({"data": ["p.jsonl"], "answers": "student", "samples_per_prompt": 3}, r"no multiple of samples_per_prompt 3"),
        (
            {"data": ["p.jsonl"], "answers": "student", "adapter": {"rank": 4, "dropout": 0.1}},
            r"adapter.dropout: the model samples without it",
        ),
        ({"data": ["p.jsonl"], "answers": "student", "save": "best"}, r"which answers: student has not"),
        ({"data": ["p.jsonl"], "answers": "teacher", "max_tokens": 64}, r"leaves no room for a prompt"),
        ({"parallel": {"tensor": 2}}, r"parallel.tensor: distillation runs under data_replicate and data_shard alone"),
        ({"z_loss": 1e-4}, r"z_loss: beside cross_entropy"),
        (
            {"data": ["p.jsonl"], "answers": "student", "loss": "reverse_kl", "teacher_server": "http://127.0.0.1:9/v1"},
            r"teacher_server: a server gives log-probabilities of single tokens",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message):
        DistillationConfig.parse({**SETTINGS, **settings}, "distillation")


def test_data_that_cannot_be_learnt_from_is_told_in_one_line(model_folder, teacher_folder, data, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "So"}\n{"prompt": []}\n', encoding="utf-8")
    own = {"answers": "student", "loss": "policy_gradient"}
    with pytest.raises(SourceError, match=r"bad.jsonl:2: needs messages or a text under 'prompt'"):
        run(model_folder, teacher_folder, data, tmp_path / "out", data=[str(bad)], **own)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "word " * 200}) + "\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"no prompt is left to train on; raise context_length"):
        run(model_folder, teacher_folder, data, tmp_path / "out", data=[str(long)], validation_share=0, **own)
    with pytest.raises(SourceError, match=r"distillation: name files in data, or add a stage that makes tokens"):
        run(model_folder, teacher_folder, data, tmp_path / "out")
    short = tmp_path / "short"
    shape = ModelConfig(**{name: value for name, value in TINY.items() if name != "preset"}, vocab_size=320)
    save_model(initial_decoder(shape.with_changes(max_position_embeddings=32), 1), short, tokenizer=model_folder)
    with pytest.raises(ConfigError, match=r"context_length 64 exceeds the teacher's context of 32"):
        run(model_folder, short, data, tmp_path / "out", data=["chats.jsonl"])


def recipe(folder, distillation):
    path = folder / "recipe.yaml"
    path.write_text(
        "format: 1\nname: taught\ncollect: [python_docs]\ntokenize: {vocab_size: 300}\n"
        "big: {kind: model, preset: qwen3-1m}\nlarge: {kind: pretrain, steps: 2}\nmodel: {preset: qwen3-1m}\n"
        f"distillation: {distillation}\n",
        encoding="utf-8",
    )
    return load_recipe(str(path))


def test_in_a_recipe_the_teacher_is_a_stage_or_a_folder(tmp_path, model_folder):
    stage = recipe(tmp_path, "{steps: 2, context_length: 64, from: {teacher: large}}").stage("distillation")
    assert {role: source.stage for role, source in stage.inputs.items()} == {
        "model": "model",
        "teacher": "large",
        "tokens": "tokenize",
    }
    settings = f"{{steps: 2, context_length: 64, teacher: {model_folder}, data: [chats.jsonl]}}"
    named = recipe(tmp_path, settings).stage("distillation")
    assert set(named.inputs) == {"model"}
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"teacher: nowhere: no such folder"):
        SPEC.fingerprint(named.config.with_changes(teacher="nowhere"), _Outside(tmp_path))
    assert "model.safetensors" in SPEC.fingerprint(named.config, _Outside(tmp_path))["teacher"]
    with pytest.raises(ConfigError, match=r"from: teacher is not read under these settings"):
        recipe(tmp_path, f"{{steps: 2, context_length: 64, teacher: {model_folder}, from: {{teacher: large}}}}")


def test_a_teachers_chat_template_is_among_what_its_answers_depend_on(teacher_folder, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "copy")
    before = teacher_fingerprint("copy", tmp_path)
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    assert teacher_fingerprint("copy", tmp_path) != before


def test_a_model_is_not_its_own_teacher(tmp_path):
    config = recipe(tmp_path, "{steps: 2, context_length: 64}").stage("distillation").config
    inputs = {"model": tmp_path / "one", "teacher": tmp_path / "one"}
    assert "would be its own teacher; name another one" in SPEC.unusable(config, inputs, tmp_path)
    assert SPEC.unusable(config, {**inputs, "teacher": tmp_path / "two"}, tmp_path) is None


class _Outside:
    def __init__(self, folder):
        self.folder = folder


def test_a_loss_that_a_package_adds_is_told_for_the_key():
    config = DistillationConfig.parse({"loss": "jsd"}, "distillation")
    assert ("bessemer.distillation_losses", "jsd") in config.plugins()
