import pytest

from bessemer.posttraining.encoding import encode_answer, encode_prompt
from tests.posttraining.test_formats import said


def learnt(encoded, tokenizer):
    return tokenizer.decode(encoded.ids[encoded.is_learnt].tolist(), skip_special=False)


def test_only_the_answer_is_learnt_and_its_end(tokenizer):
    prompt = (said("user", "Who?"), said("assistant", "Me."), said("user", "And?"))
    encoded = encode_answer(prompt, (said("assistant", "You."),), tokenizer)
    assert learnt(encoded, tokenizer) == "You.<|im_end|>"
    whole = encode_answer((), (*prompt, said("assistant", "You.")), tokenizer)
    assert learnt(whole, tokenizer) == "Me.<|im_end|>You.<|im_end|>"
    assert whole.ids.tolist() == encoded.ids.tolist()


def test_an_answer_extends_its_prompt_token_by_token(tokenizer):
    prompt = (said("system", "Be brief."), said("user", "Who?"))
    ids = encode_prompt(prompt, tokenizer)
    for answer in ("Me.", " You"):
        encoded = encode_answer(prompt, (said("assistant", answer),), tokenizer)
        assert encoded.ids[: len(ids)].tolist() == ids
        assert not encoded.is_learnt[: len(ids)].any()


def test_of_texts_the_continuation_and_the_end_are_learnt(tokenizer):
    encoded = encode_answer("The sky is", " blue.", tokenizer)
    assert learnt(encoded, tokenizer) == f" blue.{tokenizer.decode([tokenizer.eos_ids[0]], skip_special=False)}"
    assert (
        encoded.ids[: -encoded.is_learnt.sum()].tolist()
        == tokenizer.encode("The sky is")
        == encode_prompt("The sky is", tokenizer)
    )


def test_a_cut_leaves_a_target_or_nothing(tokenizer):
    encoded = encode_answer((said("user", "Who?"),), (said("assistant", "Me and you."),), tokenizer)
    begin = int(encoded.is_learnt.argmax())
    tokens, targets = encoded.example(begin)
    assert len(tokens) == begin and targets.tolist() == [-100] * (begin - 1) + [encoded.ids[begin]]
    assert encoded.example(begin - 1) is None


def test_texts_and_messages_are_not_mixed(tokenizer):
    with pytest.raises(TypeError, match="both be texts or both messages"):
        encode_answer("Who?", (said("assistant", "Me."),), tokenizer)
