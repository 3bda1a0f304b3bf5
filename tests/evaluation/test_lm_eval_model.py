"""The adapter beside the harness's own model of `transformers`, on the same folder."""

import math

import pytest

from bessemer.core.errors import ConfigError
from bessemer.inference.engine import SamplingParams
from bessemer.model.config import ModelConfig
from bessemer.model.storage.folder import save_model
from tests.model.randomised import random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

pytestmark = pytest.mark.peer(name="lm-eval")

CONTEXT = 96
PAIRS = [
    ("The cat sat on the", " mat"),
    ("The cat sat on the", " hat and slept"),
    ("The cat sat on the ", "mat"),
    ("", "begin"),
    ("x" * 200, " the end"),
    ("The thin", " ice"),
]
TEXTS = ["a thin line in the end", "the " * 150, "é"]
CHAT = [{"role": "user", "content": "Which? <|im_end|>"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Ours and that of `transformers`."""
    from lm_eval.models.huggingface import HFLM

    from bessemer.evaluation.lm_eval_model import BessemerLM

    folder = tmp_path_factory.mktemp("lm-eval")
    config = ModelConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT)
    save_model(random_decoder(config), folder / "model", tokenizer=write_small_tokenizer(folder / "tokenizer"))
    place = str(folder / "model")
    return BessemerLM(place), HFLM(pretrained=place, device="cpu", dtype="float32", max_length=CONTEXT, batch_size=1)


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_log_likelihoods_are_the_peers(models):
    ours, peer = (model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for model in models)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in peer], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in peer]


def test_rolling_log_likelihoods_score_every_token_once(models):
    given = [(text,) for text in TEXTS]
    ours, peer = models
    tokenizer = ours.engine.tokenizer
    values = ours.loglikelihood_rolling(requests("loglikelihood_rolling", given), disable_tqdm=True)
    begins = len(tokenizer.begin_ids)
    assert begins <= 1
    if not begins:
        assert values == pytest.approx(peer.loglikelihood_rolling(requests("loglikelihood_rolling", given), True), abs=1e-3)
    # a text that the context holds, in one pass
    (score,) = ours.engine.score([tokenizer.bos_id], [tokenizer.encode(TEXTS[0], add_bos=False)])
    assert values[0] == pytest.approx(score.total, abs=1e-4)


@pytest.mark.parametrize("settings", [{"until": ["t"], "max_gen_toks": 20}, {"until": "zzz", "max_gen_toks": 8}])
def test_generated_texts_are_the_peers(models, settings):
    given = [(context, settings) for context in ("The cat", "a thin line", "x" * 200)]
    ours, peer = (model.generate_until(requests("generate_until", given), disable_tqdm=True) for model in models)
    assert ours == peer


def test_a_conversation_keeps_what_a_user_typed_as_text(models):
    ours, _ = models
    tokenizer = ours.engine.tokenizer
    text = ours.apply_chat_template(CHAT)
    ((value, _),) = ours.loglikelihood(requests("loglikelihood", [(text, "no")]), disable_tqdm=True)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    # the line break behind the role is scored with the answer, as the harness does
    line_break = tokenizer.encode("\n", add_bos=False)
    assert ids[-len(line_break) :] == line_break
    (score,) = ours.engine.score(ids[: -len(line_break)], [line_break + tokenizer.encode("no", add_bos=False)])
    assert value == pytest.approx(score.total, abs=1e-4)
    (made,) = ours.engine.generate([ids], SamplingParams(max_tokens=4, temperature=0))
    assert ours.generate_until(requests("generate_until", [(text, {"max_gen_toks": 4})]), disable_tqdm=True) == [made.text]


def test_a_generation_setting_that_the_engine_does_not_have_is_refused(models):
    with pytest.raises(ConfigError, match="unknown key 'penalty_alpha'"):
        models[0].generate_until(
            requests("generate_until", [("a", {"do_sample": True, "penalty_alpha": 1})]), disable_tqdm=True
        )


def test_the_harness_runs_a_task_of_its_own(models):
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask

    class Animals(ConfigurableTask):
        VERSION = 0
        DATASET_PATH = "none"

        def download(self, *_args, **_kwargs):
            from datasets import Dataset

            rows = [{"query": f"the {name}", "choices": [" is", " in"], "gold": 0} for name in ("cat", "dog", "hen")]
            self.dataset = {"test": Dataset.from_list(rows)}

    config = {
        "task": "animals",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
    }
    results = [simple_evaluate(model, tasks=[Animals(config=config)], bootstrap_iters=0) for model in models]
    ours, peer = (result["results"]["animals"]["acc,none"] for result in results)
    assert ours == peer and not math.isnan(ours)
