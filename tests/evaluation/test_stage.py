import json

import pytest
import torch

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.progress import Silent
from bessemer.core.records import json_lines
from bessemer.core.stage import Outside, StageContext
from bessemer.data.corpus.reader import iterate_documents
from bessemer.evaluation.baselines import witten_bell_bits_per_byte, xz_bits_per_byte
from bessemer.evaluation.config import EVALUATE_VERSION, EvaluateConfig
from bessemer.evaluation.specs import STAGES
from bessemer.evaluation.stage import evaluate
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.stage import tokenize
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.validation import bits_per_byte
from tests.evaluation.test_questions import write_conversations
from tests.golden import exact_weights
from tests.tasks.published_pictures import PICTURES, pope_json
from tests.tokenization.conftest import synthetic_corpus, write_corpus

CONFIG = EvaluateConfig(context_length=32, questions=4, max_new_tokens=5, batch_size=4)


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Documents, tokens, two untrained models and questions."""
    root = tmp_path_factory.mktemp("line")
    texts = synthetic_corpus(20)
    write_corpus(root / "documents", texts)
    tokenize(TokenizeConfig(vocab_size=300), root / "documents", root, seed=3, progress=Silent())
    tokenizer = load_tokenizer(root / "tokenizer")
    for seed, name in enumerate(("pretrain", "sft")):
        torch.manual_seed(seed)
        shape = ModelConfig(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=16,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.bos_id,
        )
        save_model(Decoder(shape), root / name, tokenizer=root / "tokenizer")
    write_conversations(root / "conversations")
    return root, texts


def run(root, out, config=CONFIG, conversations=True, models=("pretrain", "sft")):
    out.mkdir(exist_ok=True)
    inputs = {f"model:{name}": root / name for name in models}
    inputs |= {"tokens": root / "tokens", "documents": root / "documents"}
    if conversations:
        inputs["conversations"] = root / "conversations"
    return evaluate(context(config, inputs, out))


def context(config, inputs, out):
    return StageContext(config, inputs, out, folder=out, cache=out, seed=1, device="cpu", progress=Silent())


def test_results_hold_every_models_score_the_baselines_and_the_comparison(line, tmp_path):
    root, texts = line
    results = run(root, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8")) == results
    held_out, trained_on = [t.encode() for t in texts[::5]], [t.encode() for i, t in enumerate(texts) if i % 5]
    expected = witten_bell_bits_per_byte(trained_on, held_out, [5, 6])
    assert results["baselines"]["witten_bell_5gram"] == pytest.approx(expected[5])
    assert results["baselines"]["witten_bell_6gram"] == pytest.approx(expected[6])
    assert results["baselines"]["xz"] > 0
    assert set(results["bits_per_byte"]) == {"pretrain", "sft"}
    assert set(results["tasks"]["docs_questions"]["sft"]) == {
        "asked_as",
        "n_held_in",
        "n_held_out",
        "exact_match_held_in",
        "exact_match_held_out",
        "rouge_l_held_in",
        "rouge_l_held_out",
    }
    for rows in results["bits_per_byte_by"].values():
        parts = sum(row["bits_per_byte"]["sft"] * row["bytes"] for row in rows)
        assert parts / results["scored"]["bytes"] == pytest.approx(results["bits_per_byte"]["sft"])
    assert list(results["bits_per_byte_by"]) == ["source", "position"]
    (comparison,) = results["comparisons"]
    assert (comparison["a"], comparison["b"], comparison["n"]) == ("sft", "pretrain", 3)
    low, high = comparison["interval"]
    assert low <= comparison["difference"] <= high


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_bits_per_byte_are_those_of_trainings_own_measure(line, tmp_path, monkeypatch, dtype, tolerance):
    # bfloat16 also where it is slow
    monkeypatch.setattr("bessemer.model.device.product_cost", lambda dtype, device: 1.0)
    root, _ = line
    results = run(root, tmp_path / "out", CONFIG.with_changes(dtype=dtype))
    model = load_model(root / "sft")
    score = bits_per_byte(model, TokenShards(root / "tokens" / "validation"), context_length=32, batch_size=1)
    assert results["bits_per_byte"]["sft"] == pytest.approx(score.bits_per_byte, rel=tolerance)
    assert results["dtypes"] == {"pretrain": dtype, "sft": dtype}


@pytest.mark.parametrize(("is_fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_type_is_the_one_that_the_device_multiplies_fast(line, tmp_path, monkeypatch, is_fast, dtype):
    monkeypatch.setattr("bessemer.evaluation.stage.is_fast", lambda dtype, device: is_fast)
    assert run(line[0], tmp_path / "out", conversations=False)["dtypes"] == {"pretrain": dtype, "sft": dtype}


def test_every_answer_is_written_beside_its_reference(line, tmp_path):
    root, _ = line
    run(root, tmp_path / "out")
    lines = json_lines((tmp_path / "out" / "answers.jsonl").read_text(encoding="utf-8"))
    assert [line["set"] for line in lines] == ["held_in"] * 4 + ["held_out"] * 3
    assert all(set(line["answers"]) == {"pretrain", "sft"} and line["reference"] for line in lines)


def test_the_same_evaluation_gives_the_same_files(line, tmp_path):
    root, _ = line
    for name in ("a", "b"):
        run(root, tmp_path / name)
    for file in ("results.json", "answers.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_task_by_name_is_asked_of_every_model_and_compared(line, tmp_path):
    root, _ = line
    results = run(root, tmp_path, CONFIG.with_changes(tasks=["sums_held_out"], questions=40), conversations=False)
    (by_model,) = results["tasks"].values()
    assert [set(of) for of in by_model.values()] == [{"asked_as", "n", "accuracy"}] * 2
    assert [one["metric"] for one in results["comparisons"]] == ["sums_held_out"]
    lines = json_lines((tmp_path / "answers.jsonl").read_text(encoding="utf-8"))
    assert len(lines) == 40 and lines[0]["reference"] == str(eval(lines[0]["messages"][-1]["content"].removesuffix(" =")))
    right = [line["answers"]["sft"]["exact_match"] for line in lines]
    assert by_model["sft"]["accuracy"] == sum(right) / 40
    with pytest.raises(ConfigError, match=r"there is no task 'sum_held_out'; did you mean 'sums_held_out'"):
        run(root, tmp_path, CONFIG.with_changes(tasks=["sum_held_out"]))


def test_without_questions_the_task_is_left_out(line, tmp_path):
    root, _ = line
    results = run(root, tmp_path / "out", CONFIG.with_changes(baselines=["xz"]), conversations=False, models=["pretrain"])
    assert (results["tasks"], results["comparisons"], list(results["baselines"])) == ({}, [], ["xz"])


def test_ngram_models_see_no_more_than_the_limit(line, tmp_path):
    root, _ = line
    whole = run(root, tmp_path / "a", CONFIG.with_changes(tasks=[]), models=["sft"])
    limited = run(root, tmp_path / "b", CONFIG.with_changes(tasks=[], baseline_bytes=500), models=["sft"])
    assert limited["baselines"]["witten_bell_5gram"] > whole["baselines"]["witten_bell_5gram"]
    assert limited["baselines"]["xz"] == whole["baselines"]["xz"]


def test_baselines_are_measured_on_the_documents_that_the_models_are(line, tmp_path):
    root, texts = line
    limit = 2 + max(len(load_tokenizer(root / "tokenizer").encode(text)) for text in texts)
    results = run(root, tmp_path / "out", CONFIG.with_changes(tasks=[], max_tokens=limit), models=["sft"])
    count = results["scored"]["documents"]
    batches = iterate_documents(root / "documents", ["text"], "validation")
    first = [text.encode() for batch in batches for text in batch["text"].to_pylist()][:count]
    assert 0 < count < 4
    assert results["scored"]["bytes"] == sum(map(len, first))
    assert results["baselines"]["xz"] == xz_bits_per_byte(first)


def test_tokens_of_another_tokenizer_are_refused(line, tmp_path):
    root, _ = line
    tokenize(TokenizeConfig(vocab_size=290), root / "documents", tmp_path, seed=3, progress=Silent())
    inputs = {"model:sft": root / "sft", "tokens": tmp_path / "tokens", "documents": root / "documents"}
    with pytest.raises(ArtefactError, match="made with another tokenizer than sft's"):
        evaluate(context(CONFIG, inputs, tmp_path))


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ConfigError, match=r"evaluate\.baselines\.0"):
        EvaluateConfig.parse({"baselines": ["zip"]}, "evaluate")


def test_golden_output(line, tmp_path):
    """When this fails because the output was meant to change, raise EVALUATE_VERSION and renew the figures."""
    root, _ = line
    models = {name: load_model(root / name) for name in ("pretrain", "sft")}
    for model, scale in zip(models.values(), (1, 2), strict=True):
        exact_weights(model).head_weight.data.mul_(scale)
    for name in ("tokens", "documents", "conversations"):
        (tmp_path / name).symlink_to(root / name)
    for name, model in models.items():
        save_model(model, tmp_path / name, tokenizer=root / "tokenizer")
    results = run(tmp_path, tmp_path / "out", CONFIG.with_changes(dtype="float32"))
    assert (EVALUATE_VERSION, results["scored"]) == (5, {"documents": 4, "bytes": 1917})
    assert results["bits_per_byte"] == pytest.approx({"pretrain": 3.410863, "sft": 3.434553}, rel=1e-5)
    xz = results["baselines"].pop("xz")
    assert results["baselines"] == pytest.approx({"witten_bell_5gram": 1.379647458, "witten_bell_6gram": 1.461811714})
    assert xz == pytest.approx(3.522, rel=0.01)  # as the installed liblzma compresses
    said_nothing = {"exact_match_held_in": 0, "rouge_l_held_in": 0, "exact_match_held_out": 0, "rouge_l_held_out": 0}
    expected = {"asked_as": "chat", "n_held_in": 4, "n_held_out": 3, **said_nothing}
    assert results["tasks"] == {"docs_questions": {"pretrain": expected, "sft": expected}}


def test_the_key_knows_what_task_files_ask(tmp_path):
    spec = next(spec for spec in STAGES if spec.kind == "evaluate")
    outside = Outside(tmp_path, tmp_path, fetch=False, progress=Silent())
    assert spec.fingerprint(EvaluateConfig(tasks=["docs_questions", "sums_held_out"]), outside) is None

    pope_json(tmp_path / "data")
    (tmp_path / "seen.yaml").write_text("kind: pope\ndata: coco\n", encoding="utf-8")
    config = EvaluateConfig(tasks=["seen.yaml"], tasks_folder="data")
    before = spec.fingerprint(config, outside)
    assert before["seen"]["settings"]["kind"] == "pope" and spec.fingerprint(config, outside) == before
    (tmp_path / "data" / "val2014" / "COCO_val2014_000000000000.png").write_bytes(PICTURES[3])
    assert spec.fingerprint(config, outside) != before
    with pytest.raises(ArtefactError, match="there is no coco"):
        spec.fingerprint(config.with_changes(tasks_folder=None), outside)


def test_a_task_file_of_the_recipes_folder_is_asked(line, tmp_path):
    root, _ = line
    rows = [{"context": f"{n} plus {n} is", "answer": str(2 * n)} for n in range(3)]
    (tmp_path / "doubles.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "doubles.yaml").write_text("kind: generate\ndata: doubles.jsonl\nmax_tokens: 4\n", encoding="utf-8")
    inputs = {"model:sft": root / "sft", "tokens": root / "tokens", "documents": root / "documents"}
    (tmp_path / "out").mkdir()
    context = StageContext(
        CONFIG.with_changes(tasks=["doubles.yaml"], baselines=[]),
        inputs,
        tmp_path / "out",
        tmp_path,
        tmp_path,
        1,
        "cpu",
        Silent(),
    )
    evaluate(context)
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["tasks"]["doubles.yaml"]["sft"]["n"] == 3
