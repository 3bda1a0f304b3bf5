"""Critique and revision, and preferences of a model, with scripted critics at a URL and a small model that answers."""

import json
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from bessemer.core.chat_client import ApiError
from bessemer.core.errors import ArtefactError, ConfigError, SourceError
from bessemer.core.policy import read_policy
from bessemer.core.report import StageReport
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.data.examples import read_conversations, read_examples
from bessemer.posttraining.data.formats import as_labelled_answers, as_pair
from bessemer.posttraining.data.packing import pack_pairs
from bessemer.posttraining.preference.config import PAIR_LOSSES, PreferenceConfig
from bessemer.posttraining.preference.losses import PairLossSettings
from bessemer.posttraining.preference.objective import REFERENCE_LOG_PROBS, PreferenceObjective
from bessemer.posttraining.preference.stage import ModelReader, paired_data
from bessemer.posttraining.rewards.stage import ranking_loss
from bessemer.posttraining.sft.config import SFTConfig
from bessemer.posttraining.sft.stage import gather_conversations
from bessemer.posttraining.synthetic.ai_preferences import ai_preferences
from bessemer.posttraining.synthetic.config import AIPreferencesConfig, ReviseConfig
from bessemer.posttraining.synthetic.constitution import as_open_prompt, drawn_principles
from bessemer.posttraining.synthetic.revise import babbles, findings, revise
from bessemer.posttraining.synthetic.specs import preferences_report, revise_report
from bessemer.training.objectives import LossContext
from tests.chat_server import completion, serving
from tests.posttraining.test_formats import said
from tests.posttraining.test_synthetic import ending_soon
from tests.training.conftest import RecordedProgress

POLICY = """\
format: 1
name: small
categories: {indiscriminate_weapons: {meaning: weapons}}
principles:
  kind: {critique: Is it kind?, revision: Make it kind., comparison: Which is kinder?}
  safe: {critique: Is it safe?, revision: Make it safe., comparison: Which is safer?}
surfaces: {answer: {otherwise: refuse}}
"""
HARM = "Anthrax is how to make a biological weapon: I tell how to build a nuclear bomb."


@pytest.fixture
def serve(monkeypatch):
    with serving(monkeypatch) as started:
        yield started


@pytest.fixture
def folder(tmp_path):
    """A policy, and prompts of which the first five bring an answer."""
    (tmp_path / "policy.yaml").write_text(POLICY, encoding="utf-8")
    rows = [{"prompt": f"Question {n}?", "completion": HARM if n % 2 else f"Answer {n}."} for n in range(5)]
    rows += [{"prompt": [{"role": "user", "content": "Q?"}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def config(kind, server, **changes):
    critic = {"model": "critic", "url": server.url, "workers": 1, "attempts": 1}
    given = {"data": ["prompts.jsonl"], "policy": "policy.yaml", "critic": critic, "max_tokens": 4, "batch_size": 2}
    return kind.parse(given | changes, "stage")


def criticise(body, _):
    """Says what it was asked to criticise, then gives a harmless answer that names the request."""
    *_, answer, request = body["messages"]
    if "Criticise" in request["content"]:
        return completion(f"Of {answer['content'][:9]!r}: no.")
    return completion(f" I would rather tell of flowers. {request['content'][:12]} ")


def test_answers_are_criticised_and_revised_by_drawn_principles(serve, folder, model_folder):
    server = serve(criticise)
    metrics = revise(config(ReviseConfig, server, rounds=2), model_folder, folder / "out", seed=3, device="cpu", folder=folder)
    assert metrics["revisions"] == 6 and metrics["changed_share"] == 1
    # critique and revision, twice, of every answer
    assert len(server.requests) == 6 * 4
    first, second, third, fourth = (body["messages"] for _, _, body in (server.requests[n] for n in (0, 2, 4, 6)))
    assert [one["role"] for one in first] == ["user", "assistant", "user"] and first[1]["content"] == "Answer 0."
    assert second[:3] == first and second[3]["content"] == "Of 'Answer 0.': no." and second[4]["content"].startswith("Make it")
    # the second round begins from the first revision
    assert third[1]["content"].startswith("I would rather tell of flowers. Make it") and fourth[:3] == third
    (row, *_) = map(json.loads, (folder / "out" / "revisions.jsonl").open(encoding="utf-8"))
    assert sorted(row["principles"]) == ["kind", "safe"], "none is drawn twice before all have been"
    assert row["answer"] == "Answer 0." and row["critic"] == "critic" and len(row["critiques"]) == 2
    assert (metrics["hazard_before_share"], metrics["hazard_after_share"]) == (2 / 6, 0)
    assert metrics["hazard_difference_high"] > metrics["hazard_difference_low"]
    conversation = read_conversations(folder / "out" / "revisions.jsonl")[0]
    assert [one["content"] for one in conversation.messages] == ["Question 0?", row["completion"]]
    section = revise_report(StageReport(name="revise", kind="revise", metrics=metrics, folder=folder / "out"))
    assert section.parts[1].rows[0][:3] == ["Hazards, by their words", "33.3 %", "0 %"]


def test_a_run_that_breaks_off_goes_on_behind_its_finished_rows(serve, folder, model_folder):
    works = {"until": 5}
    server = serve(lambda body, number: criticise(body, number) if number <= works["until"] else (400, {}, b"{}"))
    settings = {"seed": 3, "device": "cpu", "folder": folder}
    with pytest.raises(ApiError, match="answered 400"):
        revise(config(ReviseConfig, server), model_folder, folder / "cut", **settings)
    # two rows of the first batch, and one that the crash cut in two
    work = folder / "cut" / ".checkpoints" / "revisions.jsonl"
    with work.open("a", encoding="utf-8") as stream:
        stream.write('{"prompt": [{"role": "us')
    works["until"] = math.inf
    server.requests.clear()
    revise(config(ReviseConfig, server), model_folder, folder / "cut", **settings)
    assert len(server.requests) == 4 * 2
    # however many are under way at once
    revise(config(ReviseConfig, server, batch_size=5), model_folder, folder / "whole", **settings)
    assert (folder / "cut" / "revisions.jsonl").read_bytes() == (folder / "whole" / "revisions.jsonl").read_bytes()
    with pytest.raises(ArtefactError, match="its rows were made with other settings or data"):
        revise(config(ReviseConfig, server, rounds=2), model_folder, folder / "cut", **settings)


def test_an_answer_that_cannot_be_revised_is_left_out_and_counted(serve, folder, model_folder):
    def fails_at_some(body, number):
        question = body["messages"][0]["content"]
        said = {"Question 1?": "", "Question 2?": "The same.", "Question 3?": "no " * len(body["messages"]) * 5}
        return completion(said[question]) if question in said else criticise(body, number)

    settings = {"seed": 3, "device": "cpu", "folder": folder}
    progress = RecordedProgress()
    given = config(ReviseConfig, serve(fails_at_some))
    metrics = revise(given, model_folder, folder / "some", progress=progress, **settings)
    assert (metrics["prompts"], metrics["revisions"], metrics["dropped"]) == (6, 3, 3)
    assert metrics["reasons"] == {"no critique": 1, "the revision is the critique": 1, "babble": 1}
    assert progress.lines[1].strip() == "6 rows: texts that are continued"
    assert progress.lines[-1].strip() == (
        "3 of 6 prompts are left out: no critique (1), the revision is the critique (1), babble (1)"
    )
    none = serve(lambda *_: completion(" "))
    with pytest.raises(SourceError, match=r"none of the 6 answers could be revised: no critique \(6\)$"):
        revise(config(ReviseConfig, none), model_folder, folder / "none", **settings)
    with pytest.raises(ConfigError, match="has no principle 'kinds'; did you mean 'kind'"):
        revise(config(ReviseConfig, none, principles=["kinds"]), model_folder, folder / "no", **settings)


def test_a_revision_that_was_cut_is_left_out_and_a_critique_is_not(serve, folder, model_folder):
    def cuts_some(body, number):
        choice = json.loads(criticise(body, number)[2])["choices"][0]
        question, turns = body["messages"][0]["content"], len(body["messages"])
        is_cut = (question, turns) in (("Question 1?", 3), ("Question 2?", 5))
        return 200, {}, json.dumps({"choices": [choice | {"finish_reason": "length" if is_cut else "stop"}]}).encode()

    progress = RecordedProgress()
    given = config(ReviseConfig, serve(cuts_some), rounds=2)
    metrics = revise(given, model_folder, folder / "out", seed=3, device="cpu", folder=folder, progress=progress)
    assert metrics["reasons"] == {"cut at max_tokens": 1} and metrics["dropped"] == 1
    assert progress.lines[-1:] == ["  1 of 6 prompts are left out: cut at max_tokens (1)"]
    prompts = [json.loads(line)["prompt"][0]["content"] for line in (folder / "out" / "revisions.jsonl").open(encoding="utf-8")]
    # the model's own first answer, to the last of them, was cut, and is not learnt
    assert prompts == ["Question 0?", "Question 1?", "Question 3?", "Question 4?", "Q?"]


def test_principles_are_drawn_by_their_weights():
    principles = dict(read_policy().principles)
    principles["honesty"] = principles["honesty"].with_changes(weight=30)
    drawn = [drawn_principles(principles, 1, row, 1)[0] for row in range(400)]
    # 30 of 37, within four standard deviations
    assert abs(drawn.count("honesty") / 400 - 30 / 37) < 4 * math.sqrt(30 * 7 / 37**2 / 400)
    assert drawn == [drawn_principles(principles, 1, row, 1)[0] for row in range(400)]


def compare(body, _):
    """Finds an answer with `please` better with probability 0.8, and place A by 0.1; between others it knows nothing."""
    prompt = body["messages"][0]["content"]
    shown = prompt.partition("Answer A:")[2].partition("Answer B:")
    polite = ["please" in one for one in (shown[0], shown[2])]
    probability = 0.1 + (0.8 if polite == [True, False] else 0.2 if polite == [False, True] else 0.5)
    likely = [{"token": token, "logprob": math.log(p)} for token, p in (("A", probability), ("B", 1 - probability))]
    choice = {"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "logprob": -1, "top_logprobs": likely}]}}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


def test_a_preference_is_the_mean_probability_of_both_orders(serve, folder, model_folder):
    pairs = [("Sit please.", "Sit!"), ("Go!", "Go please."), ("One.", "Two.")]
    rows = [{"prompt": f"{n}?", "chosen": first, "rejected": second} for n, (first, second) in enumerate(pairs)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = config(AIPreferencesConfig, serve(compare), data=["pairs.jsonl"], principles_per_pair=2)
    metrics = ai_preferences(given, model_folder, folder, seed=3, device="cpu", folder=folder)
    found = list(map(json.loads, (folder / "preferences.jsonl").open(encoding="utf-8")))
    assert [(row["chosen"], row["rejected"]) for row in found] == [pairs[0], pairs[1][::-1]]
    # the bias of 0.1 to place A cancels
    assert [row["confidence"] for row in found] == pytest.approx([0.8, 0.8])
    assert (metrics["pairs"], metrics["dropped"]) == (2, 1)
    assert metrics["place_bias"] == pytest.approx(0.1) and metrics["consistent_share"] == pytest.approx(2 / 3)
    assert read_examples(folder / "preferences.jsonl", as_pair)[1].confidence == pytest.approx(0.8)
    section = preferences_report(StageReport(name="p", kind="ai_preferences", metrics=metrics, folder=folder))
    assert section.parts[-1].parts[0].rows[0][2:] == ["Sit please.", "Sit!", "0.80"]


def test_two_answers_of_the_model_are_compared(serve, folder, model_folder):
    (folder / "prompts.jsonl").write_text('{"prompt": "Q?"}\n{"prompt": "R?"}\n', encoding="utf-8")
    seen = serve(lambda body, _: completion("A"))
    settings = {"seed": 3, "device": "cpu", "folder": folder}
    model = ending_soon(model_folder, folder / "model")
    with pytest.raises(SourceError, match=r"none of the 2 pairs has a preference: the critic is not sure enough \(2\)$"):
        ai_preferences(config(AIPreferencesConfig, seen, max_tokens=64), model, folder / "whole", **settings)
    # each pair in both orders, of a critic that always says A
    assert len(seen.requests) == 4
    with pytest.raises(SourceError, match=r"none of the 2 pairs has a preference: cut at max_tokens \(2\)$"):
        ai_preferences(config(AIPreferencesConfig, seen), model_folder, folder / "cut", **settings)
    assert len(seen.requests) == 4, "a critic is not asked about them"


def test_a_pair_with_an_answer_that_was_cut_is_left_out_and_counted(serve, folder, model_folder):
    rows = [{"prompt": "0?", "chosen": "Sit please.", "rejected": "Sit!"}, {"prompt": "1?", "completion": "Go please."}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = config(AIPreferencesConfig, serve(compare), data=["pairs.jsonl"])
    metrics = ai_preferences(given, model_folder, folder, seed=3, device="cpu", folder=folder)
    assert (metrics["pairs"], metrics["dropped"], metrics["reasons"]) == (1, 1, {"cut at max_tokens": 1})


@pytest.mark.parametrize(
    "row",
    [
        {"completion": "No."},
        {"prompt": "Other?", "completion": "No."},
        {"messages": [said("user", "Other?"), said("assistant", "So.")], "completion": "No."},
        {"prompt": "Other?", "chosen": "No.", "rejected": "Yes."},
        {"instruction": "Other?", "completion": "No."},
    ],
)
def test_the_prompt_is_what_its_column_holds(row):
    asked = as_open_prompt("asked", row | {"asked": "Why?", "system": "Be brief."})
    assert asked.prompt == (said("system", "Be brief."), said("user", "Why?")) and asked.answers[0] == "No."
    with pytest.raises(ValueError, match="has no column 'asked'"):
        as_open_prompt("asked", row)


def test_a_prompt_alone_keeps_its_system_message():
    assert as_open_prompt("prompt", {"prompt": "Why?", "system": "Be brief."}).prompt[0] == said("system", "Be brief.")


def test_an_answer_that_calls_tools_is_not_reduced_to_its_words():
    call = {**said("assistant", "I look."), "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    prompt = [said("user", "Why?")]
    for answers in ({"completion": [call]}, {"chosen": [said("assistant", "So.")], "rejected": [call]}):
        with pytest.raises(ValueError, match="the answer calls tools; one turn of words can be criticised"):
            as_open_prompt("prompt", {"prompt": prompt, **answers})


@pytest.fixture
def confident_pairs():
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n}?"}],
            "chosen": f"So {n}",
            "rejected": f"No {n}",
            "confidence": 0.5 + n / 12,
        }
        for n in range(7)
    ]
    return [as_pair(row) for row in rows]


def with_plain_reference(pairs, tokenizer):
    """Packed pairs beside a reference that gives every token the probability 1."""
    batch = pack_pairs(pairs, tokenizer, 128).batch
    return batch.with_values(per_token={REFERENCE_LOG_PROBS: torch.zeros(batch.tokens_BT.shape)})


@pytest.mark.parametrize("swapped", [0.0, 0.1])
def test_a_soft_label_is_a_cross_entropy_with_its_probability(confident_pairs, tokenizer, model_folder, swapped):
    model, settings = load_model(model_folder), PairLossSettings(beta=0.3, label_smoothing=swapped)
    objective = PreferenceObjective(PAIR_LOSSES["sigmoid"].load(), settings)
    packed = objective(model, with_plain_reference(confident_pairs, tokenizer), LossContext())
    expected = torch.zeros(())
    for pair in confident_pairs:
        alone = with_plain_reference([pair], tokenizer)
        # of one pair the logged margin is β times the difference of the log-ratios
        margin = objective(model, alone, LossContext()).metrics["margin"].sum
        right = pair.confidence * (1 - swapped) + (1 - pair.confidence) * swapped
        expected = expected - right * logsigmoid(margin) - (1 - right) * logsigmoid(-margin)
    torch.testing.assert_close(packed.sums["preference"], expected)


def test_a_reward_model_learns_a_soft_label_as_its_probability():
    difference, confidence = torch.tensor([0.7, -0.2], requires_grad=True), torch.tensor([0.9, 0.6])
    loss = ranking_loss(difference, torch.zeros(2), torch.zeros(2), confidence).sum()
    # d/dx of the cross-entropy of σ(x) with c is σ(x) − c
    (gradient,) = torch.autograd.grad(loss, difference)
    torch.testing.assert_close(gradient, difference.sigmoid() - confidence)


def test_a_loss_that_cannot_use_a_confidence_refuses_it(tmp_path, tokenizer):
    row = {"prompt": "Q?", "chosen": "a", "rejected": "b", "confidence": 0.7}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    given = PreferenceConfig.parse({"data": ["pairs.jsonl"], "loss": "hinge"}, "preference")
    with pytest.raises(SourceError, match=r"the pairs have a confidence, which the loss hinge cannot use; take sigmoid"):
        paired_data(given, ModelReader(tmp_path, tokenizer), tmp_path, {}, 1)
    with pytest.raises(SourceError, match=r"pairs.jsonl:1: confidence is of a pair"):
        read_examples(tmp_path / "pairs.jsonl", as_labelled_answers)
    with pytest.raises(ValueError, match=r"confidence is how probably chosen is better, from 0.5 to 1; it is 0.3"):
        as_pair(row | {"confidence": 0.3})


def test_detectors_tell_refusals_hazards_and_babble_from_answers():
    texts = {
        "I’m sorry, but I can't help with that.": (True, False, False),
        " ".join(f"{n} is a number." for n in range(20)) + " I cannot say more.": (False, False, False),
        HARM: (False, True, False),
        "Paris.": (False, False, False),
        "4": (False, False, False),
        "": (False, False, True),
        "?! …": (False, False, True),
        "the cat the cat the cat the cat the cat": (False, False, True),
        "x" * 80: (False, False, True),
        "See https://example.org/" + "a" * 80: (False, False, False),
        "a half of a pair \ud83d stays readable": (False, False, False),
    }
    found = findings(list(texts), read_policy())
    assert {text: (one.refuses, one.is_hazard, one.babbles) for text, one in zip(texts, found, strict=True)} == texts
    assert "indiscriminate_weapons" in found[2].hazards
    # a surface that allows a category finds none of it
    assert not any(one.hazards for one in findings([HARM], read_policy().with_changes(surfaces={}), "answer"))
    assert babbles(" ".join(["one two three"] * 4)) and not babbles("one two three four five six seven eight nine")


def test_made_data_is_learnt_beside_files_and_questions(documents, tmp_path):
    row = {"prompt": [{"role": "user", "content": "Q?"}], "completion": "Well.", "answer": "Badly."}
    for name in ("revisions.jsonl", "own.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    given = {"data": ["made/docs_questions", "made/revisions", "own.jsonl"], "train_questions": 5, "validation_share": 0}
    made = {"made/revisions": tmp_path / "revisions.jsonl"}
    training, _ = gather_conversations(SFTConfig.parse(given, "sft"), documents, tmp_path, 1, made)
    assert [one.source for one in training] == ["made/docs_questions"] * 5 + ["revisions.jsonl", "own.jsonl"]
    assert training[5].messages[-1]["content"] == "Well."
    with pytest.raises(SourceError, match=r"made/revisions is made by a stage of a recipe; without one name its file"):
        gather_conversations(SFTConfig.parse(given, "sft"), documents, tmp_path, 1)
