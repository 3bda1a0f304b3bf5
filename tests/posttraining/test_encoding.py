import json
import shutil

import numpy as np
import pytest
import tokenizers

from bessemer.core.errors import RequestError
from bessemer.posttraining.data.encoding import Encoded, encode_answer, encode_prompt
from bessemer.tokenization.tokenizer import load_tokenizer
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


def test_windows_hold_every_target_once():
    encoded = Encoded(np.arange(10, 15), np.ones(5, dtype=bool))
    assert [window.ids.tolist() for window in encoded.windows(2)] == [[10, 11, 12], [12, 13, 14]]
    alone = Encoded(np.array([10]), np.array([True]))
    assert [window.ids.tolist() for window in alone.windows(1)] == [[10]]


def test_the_beginning_has_as_many_targets_as_inputs():
    encoded = Encoded(np.arange(10, 17), np.array([False, False, True, True, False, True, True]))
    ids, targets = encoded.beginning(4)
    assert (ids.tolist(), targets.tolist()) == ([10, 11, 12, 13], [-100, 12, 13, -100])


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}END{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(tokenizer, folder, end):
    copy = shutil.copytree(tokenizer.folder, folder / "other")
    (copy / "chat_template.jinja").write_text(MARKED.replace("END", end), encoding="utf-8")
    return load_tokenizer(copy)


def test_the_end_token_is_learnt_where_a_template_marks_the_content_alone(tokenizer, tmp_path):
    other = with_template(tokenizer, tmp_path, "<|im_end|>\n")
    prompt = (said("user", "Who?"), said("assistant", ""), said("user", "Who?"))
    answer = (said("assistant", "Me."), said("user", "And?"), said("assistant", "You."))
    assert learnt(encode_answer(prompt, answer, other), other) == "Me.<|im_end|>You.<|im_end|>"
    assert encode_answer(prompt[:1], answer[:1], other).through_end()[-1] in other.eos_ids


def test_a_template_that_ends_no_turn_is_refused(tokenizer, tmp_path):
    other = with_template(tokenizer, tmp_path, "\n")
    with pytest.raises(RequestError, match="by no control token"):
        encode_answer((said("user", "Who?"),), (said("assistant", "Me."),), other)


def test_a_text_behind_another_is_encoded_as_its_continuation(tokenizer, tmp_path):
    """SentencePiece puts a space before a text, which is none between a prompt and its answer."""
    words = {piece: number for number, piece in enumerate(["<s>", "</s>", "▁", *"0123456789+=four"])}
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    pieces.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    pieces.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    pieces.add_special_tokens(["<s>", "</s>"])
    pieces.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}), encoding="utf-8")
    other = load_tokenizer(tmp_path)
    encoded = encode_answer("2+2=", "4", other)
    assert encoded.ids.tolist() == [*other.encode("2+2=4"), other.eos_ids[0]]
    assert [pieces.id_to_token(id) for id in encoded.ids[encoded.is_learnt]] == ["4", "</s>"]


def test_an_example_fits_to_the_token_and_is_never_cut_at_its_end(tokenizer):
    encoded = encode_answer((said("user", "Who?"),), (said("assistant", "Me and you."),), tokenizer)
    last = int(np.flatnonzero(encoded.is_learnt)[-1])
    assert encoded.inputs == last and encoded.example(last)[1][-1] == encoded.ids[last]
    assert encoded.example(last - 1) is None
    # from the left the answer is learnt while it is whole
    begin = int(encoded.is_learnt.argmax())
    tokens, targets = encoded.example(last - begin + 1, "left")
    assert (
        tokens.tolist() == encoded.ids[begin - 1 : last].tolist() and targets.tolist() == encoded.ids[begin : last + 1].tolist()
    )
    assert encoded.example(last - begin, "left") is None


def test_texts_and_messages_are_not_mixed(tokenizer):
    with pytest.raises(TypeError, match="both be texts or both messages"):
        encode_answer("Who?", (said("assistant", "Me."),), tokenizer)


def test_a_call_is_found_in_the_answer_and_not_in_what_is_said_beside_it(tokenizer, tmp_path):
    call = {"type": "function", "function": {"name": "find_order", "arguments": {}}}
    messages = (said("user", "Where?"), said("assistant", "I use find_order.") | {"tool_calls": [call]})
    assert "find_order" in learnt(encode_answer((), messages, tokenizer), tokenizer)
    other = with_template(tokenizer, tmp_path, "<|im_end|>\n")
    assert '{"name": "find_order", "arguments": {}}' in learnt(encode_answer((), messages, other), other)
