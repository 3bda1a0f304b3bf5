"""A person's adapter: trained on their feedback alone, put to use where held-out feedback says so, exported, forgotten."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_bytes
from bessemer.core.store import person_folder
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.model.adapters.folder import read_adapter
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.data.examples import read_examples
from bessemer.posttraining.data.formats import as_pair
from bessemer.posttraining.personal import (
    ADAPTER,
    HISTORY,
    PAIRS,
    PREVIOUS,
    HeldOut,
    PersonalConfig,
    decided,
    export,
    forget,
    is_held_out,
    kept_of,
    personalise,
    roll_back,
)
from tests.posttraining.test_formats import said

WORDS = ["stone", "river", "cloud", "apple", "horse", "table", "light", "winter", "bread", "paper", "green", "music"]
#: People by tastes and their opposites: how they like an answer, and how not.
TASTES = {
    "loud": (str.upper, str.lower),
    "quiet": (str.lower, str.upper),
    "eager": (lambda text: f"{text}!", lambda text: f"{text}."),
    "calm": (lambda text: f"{text}.", lambda text: f"{text}!"),
    "long": (lambda text: f"well, {text} it is", lambda text: text),
    "short": (lambda text: text, lambda text: f"well, {text} it is"),
}
CONFIG = PersonalConfig(steps=12, learning_rate=3e-3, context_length=128, batch_size=8, rank=4)


def write_feedback(people, name, first=8, second=5):
    """The pairs of a person, by their taste."""
    liked, disliked = TASTES[name]
    person = person_folder(people, name)
    person.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": [said("user", f"Say {a} {b}.")], "chosen": liked(f"{a} {b}"), "rejected": disliked(f"{a} {b}")}
        for a in WORDS[:first]
        for b in WORDS[:second]
    ]
    (person / PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return person


def held_out_of(person):
    return [pair for pair in read_examples(person / PAIRS, as_pair) if is_held_out(pair, CONFIG.held_out)]


@pytest.mark.usefixtures("one_thread")
def test_an_adapter_is_used_where_held_out_feedback_gains_and_then_forgotten(model_folder, tmp_path):
    weights = hash_bytes((model_folder / "model.safetensors").read_bytes())
    person = write_feedback(tmp_path / "people", "loud")
    with (person / PAIRS).open("a", encoding="utf-8") as file:
        canary = {"prompt": [said("user", "My word is zinc-canary-771.")], "chosen": "ZINC-CANARY-771", "rejected": "no"}
        file.write(json.dumps(canary) + "\n")
    line = personalise(model_folder, person, CONFIG, device="cpu")
    assert line["decision"] == "used" and line["gain"] >= 0.1 and line["pairs"] + line["held_out"] == 41, line
    assert sorted(path.name for path in person.iterdir()) == [ADAPTER, HISTORY, PAIRS]
    assert read_adapter(person / ADAPTER, load_model(model_folder)).updates
    assert hash_bytes((model_folder / "model.safetensors").read_bytes()) == weights

    # the person sees it, takes it along, and is forgotten: no byte of it is left
    assert kept_of(person)["pairs"] == 41 and kept_of(person)["history"][0]["decision"] == "used"
    export(person, tmp_path / "mine.zip")
    with zipfile.ZipFile(tmp_path / "mine.zip") as archive:
        assert b"zinc-canary-771" in archive.read(PAIRS) and f"{ADAPTER}/adapter_model.safetensors" in archive.namelist()
    (tmp_path / "mine.zip").unlink()
    assert forget(person) >= 4
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"canary-771" in path.read_bytes().lower() for path in left) and not person.exists()
    with pytest.raises(ArtefactError, match="nothing is kept"):
        kept_of(person)


@pytest.mark.usefixtures("one_thread")
def test_an_adapter_that_does_not_gain_is_rolled_back_and_the_one_in_use_stays(model_folder, tmp_path):
    person = write_feedback(tmp_path / "people", "eager")
    (person / ADAPTER).mkdir()
    (person / ADAPTER / "adapter_config.json").write_text("{}", encoding="utf-8")
    line = personalise(model_folder, person, CONFIG.with_changes(learning_rate=1e-9, steps=1), device="cpu")
    assert line["decision"] == "rolled back" and "is asked" in line["reason"]
    assert sorted(path.name for path in person.iterdir()) == [ADAPTER, HISTORY, PAIRS]
    assert (person / ADAPTER / "adapter_config.json").read_text(encoding="utf-8") == "{}"


def test_too_little_feedback_waits_and_a_failed_attempt_leaves_nothing(model_folder, tmp_path):
    person = write_feedback(tmp_path / "people", "calm", 2, 2)
    assert personalise(model_folder, person, CONFIG, device="cpu")["decision"] == "waits"
    assert sorted(path.name for path in person.iterdir()) == [HISTORY, PAIRS]
    write_feedback(tmp_path / "people", "calm")
    with pytest.raises(Exception, match=r".+"):
        personalise(tmp_path / "no-model", person, CONFIG, device="cpu")
    assert sorted(path.name for path in person.iterdir()) == [HISTORY, PAIRS]
    (tmp_path / "people" / "nobody").mkdir()
    with pytest.raises(ArtefactError, match="there is no feedback"):
        personalise(model_folder, tmp_path / "people" / "nobody", CONFIG)


def test_what_was_held_out_once_is_held_out_for_ever(tmp_path):
    first = held_out_of(write_feedback(tmp_path / "a", "short", 6, 6))
    later = held_out_of(write_feedback(tmp_path / "b", "short", 12, 6))
    assert 0 < len(first) < 36 and all(pair in later for pair in first)


@pytest.mark.parametrize(
    ("base", "used", "new", "decision"),
    [
        ([0, 0, 1, 1], None, [1, 1, 1, 1], "used"),
        ([0, 1, 1, 1], None, [0, 1, 1, 1], "rolled back"),
        ([0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], "rolled back"),
        ([0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], "used"),
    ],
)
def test_an_adapter_must_beat_the_base_and_equal_the_one_in_use(base, used, new, decision):
    results = HeldOut(np.array(base, float), None if used is None else np.array(used, float), np.array(new, float))
    assert decided(results, 0.1)[0] == decision


def test_rolling_back_brings_the_adapter_before(tmp_path):
    person = write_feedback(tmp_path, "long")
    for name in (ADAPTER, PREVIOUS):
        (person / name).mkdir()
        (person / name / "which").write_text(name, encoding="utf-8")
    roll_back(person)
    assert (person / ADAPTER / "which").read_text(encoding="utf-8") == PREVIOUS and not (person / PREVIOUS).exists()
    roll_back(person)
    with pytest.raises(ArtefactError, match="no adapter is in use"):
        roll_back(person)


@pytest.mark.parametrize("name", ["", "..", "../ann", "a/b", ".hidden", "x" * 65, "a b"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="a person's name is"):
        person_folder(tmp_path, name)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_while_an_adapter_is_served_nobody_else_notices(model_folder, tmp_path):
    engine = Engine(model_folder)
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=3)
    prompts = [f"Say {word}." for word in WORDS[:4]]
    before = [(one.token_ids, one.log_probs) for one in engine.generate(prompts, params)]
    person = write_feedback(tmp_path, "loud")
    assert personalise(model_folder, person, CONFIG, device="cpu")["decision"] == "used"
    engine.load_adapter("loud", person / ADAPTER)
    engine.generate(prompts, params, adapter="loud")
    assert [(one.token_ids, one.log_probs) for one in engine.generate(prompts, params)] == before
