"""A scalar head in place of the language head: in Hugging Face's form, beside `transformers`, and nowhere else."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bessemer.core.errors import ArtefactError
from bessemer.inference.build import open_model
from bessemer.inference.config import EngineConfig
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.storage.folder import as_scorer, load_model, load_scorer, new_head, save_model
from bessemer.model.storage.model_config import read_model_config
from tests.cases import slow_but
from tests.model.family_models import CASES, make

#: Families whose heads, names or architectures differ; the others are slow.
QUICK = ("llama", "qwen3", "gpt2", "gemma3", "mixtral")
#: `transformers` has no scorer of these.
WITHOUT = ("granite", "llama4_text")
FAMILIES = slow_but(QUICK, [case for case in sorted(CASES) if "-" not in case and case not in WITHOUT])


@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_scores_and_folders_are_those_of_transformers(case, tmp_path):
    made = make(case)
    made.save_pretrained(tmp_path / "language")
    ours = load_scorer(tmp_path / "language", seed=3)
    ours.score.weight.mul_(20)
    save_model(ours, tmp_path / "ours", tokenizer=None)

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert theirs.config.num_labels == 1 and type(theirs).__name__ == theirs.config.architectures[0]
    tokens_BT = torch.randint(3, 97, (1, 17), generator=torch.Generator().manual_seed(4))
    expected = theirs.eval()(tokens_BT).logits
    scores_BT1 = ours(tokens_BT)
    assert scores_BT1.shape == (1, 17, 1) and scores_BT1.std() > 0.1
    assert (scores_BT1[:, -1] - expected).abs().max() < 1e-4

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs", scores=True)
    assert back.config == ours.config and back.config.num_scores == 1
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert ours.config.parameters() == sum(parameter.numel() for parameter in ours.parameters())


def test_a_new_head_stands_in_the_place_of_the_language_head(tmp_path):
    theirs = make("llama")
    theirs.save_pretrained(tmp_path)
    language = load_model(tmp_path)
    scorer = as_scorer(language, seed=7)
    assert not hasattr(scorer, "lm_head") and not hasattr(language, "score")
    assert scorer.embed_tokens.weight.data_ptr() == language.embed_tokens.weight.data_ptr()
    assert torch.equal(scorer.score.weight, new_head(scorer.config, 7)) and as_scorer(scorer, seed=8) is scorer
    # what has no head costs nothing: neither the folder nor the settings say a word of it
    save_model(language, tmp_path / "again", tokenizer=None)
    assert "score.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    assert "id2label" not in (tmp_path / "again" / "config.json").read_text(encoding="utf-8")


def test_a_model_of_several_scores_is_read_as_it_is(tmp_path):
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, num_labels=3,
    )  # fmt: skip
    theirs = transformers.Qwen3ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, scores=True)
    tokens_BT = torch.arange(5, 14)[None]
    with torch.no_grad():
        assert (ours(tokens_BT)[:, -1] - theirs(tokens_BT).logits).abs().max() < 1e-5


def test_a_reward_model_is_refused_where_text_is_wanted(tmp_path):
    make("llama").save_pretrained(tmp_path / "language")
    save_model(load_scorer(tmp_path / "language", seed=1), tmp_path / "reward", tokenizer=None)
    assert read_model_config(tmp_path / "reward").num_scores == 1
    for wanted in (
        lambda: load_model(tmp_path / "reward"),
        lambda: export_gguf(tmp_path / "reward", tmp_path / "reward.gguf"),
        lambda: open_model(tmp_path / "reward", None, "cpu", EngineConfig()),
    ):
        with pytest.raises(ArtefactError, match=r"reward: this is a reward model, which gives scores and no text"):
            wanted()
    assert not (tmp_path / "reward.gguf").exists()
