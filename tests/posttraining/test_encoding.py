import json
import shutil

import numpy as np
import pytest
import tokenizers

from bessemer.core.errors import RequestError, SourceError
from bessemer.posttraining.data.encoding import (
    Encoded,
    RowCounts,
    RowFitter,
    Unrendered,
    encode_answer,
    encode_prompt,
    encode_turns,
)
from bessemer.posttraining.data.turns import NothingLearntError, RowError
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
    assert [window.is_learnt.tolist() for window in encoded.windows(3)] == [[True] * 4, [True] * 2]
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
    for encode in (encode_answer, encode_turns):
        for mixed in (("Who?", (said("assistant", "Me."),)), ((said("user", "Who?"),), "Me.")):
            with pytest.raises(TypeError, match="both be texts or both messages"):
                encode(*mixed, tokenizer)


def test_a_call_is_found_in_the_answer_and_not_in_what_is_said_beside_it(tokenizer, tmp_path):
    call = {"type": "function", "function": {"name": "find_order", "arguments": {}}}
    messages = (said("user", "Where?"), said("assistant", "I use find_order.") | {"tool_calls": [call]})
    assert "find_order" in learnt(encode_answer((), messages, tokenizer), tokenizer)
    other = with_template(tokenizer, tmp_path, "<|im_end|>\n")
    assert '{"name": "find_order", "arguments": {}}' in learnt(encode_answer((), messages, other), other)


def test_a_whole_answer_is_scored_at_its_end_and_a_cut_one_never():
    encoded = Encoded(np.arange(10, 16), np.array([False, False, True, True, False, False]))
    ids, targets = encoded.scored(4)
    assert (ids.tolist(), targets.tolist()) == ([10, 11, 12, 13], [-100, -100, -100, 13])
    assert encoded.scored(3) is None and encoded.inputs == 3
    assert Encoded(np.arange(3), np.zeros(3, dtype=bool)).inputs == 0


def encoded_of(inputs, learnt=1):
    return Encoded(np.arange(inputs + 1), np.arange(inputs + 1) > inputs - learnt)


def failing(error):
    def encode():
        raise error

    return encode


def test_rows_that_fit_are_counted_apart_from_those_that_do_not():
    fitter = RowFitter(4, "left")
    assert len(fitter.fit(lambda: encoded_of(4), lambda: encoded_of(3))) == 2
    assert len(fitter.fit(lambda: encoded_of(5), lambda: encoded_of(3))) == 2
    assert fitter.fit(lambda: encoded_of(4), lambda: encoded_of(9, learnt=7)) is None
    assert fitter.fit(lambda: Encoded(np.arange(3), np.zeros(3, dtype=bool))) is None
    assert fitter.fit(failing(NothingLearntError("no"))) is None
    assert fitter.fit_turns(failing(RowError("bad")), place="a:1") == []
    assert len(fitter.fit_turns(lambda: [encoded_of(4), encoded_of(9, learnt=7)])) == 1
    assert len(fitter.fit_turns(lambda: [encoded_of(4), encoded_of(6)])) == 2
    assert len(fitter.fit_turns(lambda: [encoded_of(4), encoded_of(3)])) == 2
    assert fitter.fit_turns(lambda: [encoded_of(9, learnt=7)]) == []
    counts = fitter.counts("pairs")
    assert counts == RowCounts(4, 2, 2, 2, 1, (Unrendered("a:1", "bad"),), 10)
    assert counts.left_out == 5
    assert counts.figures == {"too_long": 2, "nothing_learnt": 2, "cut": 2, "turns_left_out": 1, "unrendered": 1}
    assert counts.sentences("10 pairs") == [
        "  2 of 10 pairs are left out: longer than 4 tokens (truncate: drop)",
        "  2 of 10 pairs are left out: the assistant says nothing in them that is learnt",
        "  2 of 10 pairs are longer than 4 tokens, and their beginning is cut off (truncate: left)",
        "  1 turns of others are left out: longer than 4 tokens with their context",
        "  1 of 10 pairs are left out: a:1: bad",
    ]
    assert RowCounts(4) == RowCounts(4, 0, 0, 0, 0, (), 0) and RowCounts(4).sentences("0 pairs") == []
    assert RowCounts(4).figures == {"too_long": 0, "nothing_learnt": 0, "cut": 0}
    strict = RowFitter(4, "refuse")
    for inputs in (4, 5, 7):
        strict.fit(lambda inputs=inputs: encoded_of(inputs))
    with pytest.raises(SourceError, match="2 pairs have more than 4 tokens, the longest 7; raise"):
        strict.counts("pairs")


@pytest.mark.parametrize(
    ("unrendered", "total", "is_refused"),
    [(2, 3, False), (3, 3, True), (3, 59, True), (3, 60, False), (2, 2, True), (5, 100, False), (6, 100, True)],
)
def test_a_few_rows_that_cannot_be_rendered_are_left_out_and_many_are_refused(unrendered, total, is_refused):
    rows = tuple(Unrendered(f"a:{number}" if number % 4 else "", "bad") for number in range(unrendered))
    counts = RowCounts(4, unrendered=rows, total=total)
    if is_refused:
        with pytest.raises(SourceError, match=f"{unrendered} of {total} rows cannot be written"):
            counts.check("rows")
    else:
        counts.check("rows")


def test_the_first_row_that_cannot_be_rendered_is_told_with_the_places_of_some_others():
    rows = tuple(Unrendered(f"a:{number}", "bad") for number in range(8))
    told = [RowCounts(4, unrendered=rows[:number])._reasons() for number in (1, 2, 6, 7)]
    assert told == [
        "a:0: bad",
        "a:0: bad; 1 more (a:1)",
        "a:0: bad; 5 more (a:1, a:2, a:3, a:4, a:5)",
        "a:0: bad; 6 more (a:1, a:2, a:3, a:4, a:5, …)",
    ]
    assert RowCounts(4, unrendered=(Unrendered("", "bad"),) * 2)._reasons() == "bad; 1 more"
    for learnt, total in ((2, 3), (0, 0)):
        RowCounts(4, nothing_learnt=learnt, total=total).check("rows")
    with pytest.raises(SourceError, match="nothing would be learnt of any of the 3 rows"):
        RowCounts(4, nothing_learnt=3, total=3).check("rows")
