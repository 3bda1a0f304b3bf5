from bessemer.pipeline.summary import sentences

METRICS = {
    "model": {"parameters": 1_000_000},
    "pretrain": {"tokens": 5_000},
    "evaluate": {"bits_per_byte": {"pretrain": 1.5}, "baselines": {"xz": 2.0}},
}


def test_a_run_is_said_to_have_what_its_recipe_made():
    text = " ".join(sentences(METRICS))
    assert "Bits per byte on text held out of training, lower is better: pretrain 1.500 (beside it" in text
    assert "package" not in text and "tuned" not in text
    assert "answers the questions that it was tuned on" in " ".join(sentences(METRICS | {"sft": {}}))
