import json
import random
import shutil
from itertools import groupby

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.tokenization import fast
from bessemer.tokenization.bpe import byte_level_bpe
from bessemer.tokenization.chat import Segment
from bessemer.tokenization.control_tokens import SPECIAL_TOKENS
from bessemer.tokenization.fast import HOSTILE_TEXTS, LONG_TEXT
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.prompts import StreamingDecoder
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.tokenization.vocabulary import byte_of_name, read_vocabulary

#: Every plane but the surrogates, with what is hard drawn often: runs, white space, marks, control tokens.
hostile = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from(
            [*SPECIAL_TOKENS, "\r\n", "   ", "'s", "'ſ", "e\u0301", "👩‍👩‍👧", "İ", "\u2028", "\x00", "123456", "ﬁ"]
        ),
        st.builds(lambda character, count: character * count, st.sampled_from("a \n-1é日"), st.integers(1, 60)),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def peer(any_tokenizer):
    return cached_peer(any_tokenizer)


def test_ids_equal_those_of_autotokenizer_by_default_where_no_control_token_is_written(any_tokenizer, peer, corpus):
    for text in [*corpus, *(text for text in HOSTILE_TEXTS if not any(token in text for token in SPECIAL_TOKENS))]:
        assert any_tokenizer.encode(text) == peer(text)["input_ids"]
        assert any_tokenizer.encode(text, add_bos=False) == peer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(0, 10_000), max_size=30), skip_special=st.booleans())
def test_any_ids_decode_as_transformers_decodes_them(every_tokenizer, numbers, skip_special):
    ids = [number % every_tokenizer.vocab_size for number in numbers]
    ids = without_broken_bytes(every_tokenizer, ids, skip_special)
    assert every_tokenizer.decode(ids, skip_special) == cached_peer(every_tokenizer).decode(
        ids, skip_special_tokens=skip_special
    )


def without_broken_bytes(tokenizer, ids, skip_special):
    """Ids without those runs of byte tokens (`<0xE2>`) that spell no UTF-8: see the test that follows."""
    shown = [
        (at, byte_of_name(tokenizer._tokenizer.id_to_token(id) or ""))
        for at, id in enumerate(ids)
        if tokenizer.shown([id], skip_special)
    ]
    broken = set()
    for is_byte, run in groupby(shown, lambda entry: entry[1] is not None):
        places, values = zip(*run, strict=True)
        if is_byte and "\ufffd" in bytes(values).decode("utf-8", "replace"):
            broken |= set(places)
    return [id for at, id in enumerate(ids) if at not in broken]


def test_bytes_that_are_no_text_become_one_replacement_character_each_and_spoil_no_others(tokenizers_by_algorithm):
    """The library makes U+FFFD of every byte of a run with one bad byte, of whole characters too; a stream could not
    show any byte before the run has ended."""
    tokenizer = tokenizers_by_algorithm["unigram"]
    ids = [1 + byte for byte in "\u65e5A".encode() + b"\xff"]  # the bytes follow <unk>
    assert tokenizer.decode(ids) == "\u65e5A\ufffd"
    assert cached_peer(tokenizer).decode(ids) == "\ufffd" * 5


_peers = {}


def cached_peer(tokenizer):
    if tokenizer.folder not in _peers:
        _peers[tokenizer.folder] = AutoTokenizer.from_pretrained(tokenizer.folder)
    return _peers[tokenizer.folder]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(hostile, max_size=5))
def test_bulk_encoding_equals_encoding_one_by_one(any_tokenizer, texts):
    assert [ids.tolist() for ids in any_tokenizer.encode_batch(texts)] == [any_tokenizer.encode(text) for text in texts]
    ids, offsets = any_tokenizer.encode_flat(texts)
    assert ids.tolist() == [id for text in texts for id in any_tokenizer.encode(text, add_bos=False)]
    assert offsets.tolist()[-1] == len(ids)


def test_a_document_begins_with_the_token_that_also_ends_it(tokenizer):
    assert tokenizer.encode("")[0] == tokenizer.bos_id == tokenizer.vocab_size - 3
    assert tokenizer.eos_ids == (tokenizer.bos_id, tokenizer.vocab_size - 1)


def test_transformers_takes_the_file_as_it_is(tokenizer):
    peer = cached_peer(tokenizer)
    assert peer.backend_tokenizer.normalizer is None
    assert (peer.bos_token_id, peer.eos_token_id, len(peer)) == (tokenizer.bos_id, tokenizer.bos_id, tokenizer.vocab_size)


def test_text_that_is_not_in_normal_form_keeps_its_bytes(tokenizer):
    assert tokenizer.encode("e\u0301") != tokenizer.encode("\u00e9")


def test_control_tokens_are_shown_or_left_out(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("ab", add_bos=False), tokenizer.eos_ids[1]]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special=False) == "<|endoftext|>ab<|im_end|>"


def test_typed_control_tokens_never_become_control_tokens(tokenizer):
    ids = tokenizer.encode("".join(SPECIAL_TOKENS), add_bos=False)
    assert not any(tokenizer.is_special(id) for id in ids)
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS)


def test_one_text_is_no_list_of_texts_and_a_list_no_text(tokenizer):
    with pytest.raises(RequestError, match="a list of texts is needed, got str; encode takes one text"):
        tokenizer.encode_batch("Hello")
    with pytest.raises(RequestError, match="a text is needed, got list; encode_batch takes a list of texts"):
        tokenizer.encode(["Hello"])


def test_a_lone_surrogate_is_refused_in_one_line_wherever_it_comes_in(tokenizer):
    message = r"^the text has a lone surrogate U\+D83D at character 2"
    with pytest.raises(RequestError, match=message):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(RequestError, match=message):
        tokenizer.encode_flat(["that is fine", "ab\ud83d"])
    with pytest.raises(RequestError, match=r"^message 1: the text has a lone surrogate U\+D83D at character 2"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}, {"role": "user", "content": "ab\ud83d"}])


@pytest.mark.parametrize("id", [-1, 600])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, id):
    with pytest.raises(RequestError, match="outside the vocabulary of 600"):
        tokenizer.decode([id])


@pytest.mark.parametrize("ids", [[5, 600], [600, 5], [5, -1], [-1, 5]])
def test_one_id_outside_the_vocabulary_among_others_is_refused(tokenizer, ids):
    with pytest.raises(RequestError, match="outside the vocabulary of 600"):
        tokenizer.decode(ids)
    assert tokenizer.token_bytes(599) is not None and tokenizer.decode([]) == ""
    with pytest.raises(RequestError, match="outside the vocabulary of 600"):
        tokenizer.token_bytes(600)


def test_what_is_a_control_token_is_known_by_its_id_and_by_its_text(tokenizer):
    end = tokenizer.eos_ids[1]
    assert tokenizer.control_id("<|im_end|>") == end and tokenizer.control_id("ab") is None
    (letter,) = tokenizer.encode("a", add_bos=False)
    assert [(tokenizer.is_special(id), tokenizer.is_end(id)) for id in (end, letter)] == [(True, True), (False, False)]
    assert tokenizer.end_tokens == {"<|endoftext|>", "<|im_end|>"}
    assert tokenizer._any_end == Segment("<|endoftext|>", is_control=True, is_assistant=False)
    assert tokenizer.lossless and tokenizer.tool_format == "" and tokenizer.template_hash is not None


def test_parts_of_a_conversation_have_the_ids_of_the_whole_where_control_tokens_part_them(tokenizer):
    parts = [
        [Segment("<|im_start|>", True, False), Segment("user\nadd 1\n", False, False)],
        [Segment("<|im_end|>", True, False), Segment("\n\n", False, False)],
        [Segment("<|im_start|>", True, False), Segment("assistant\n2", False, True)],
    ]
    together, apart = tokenizer.encode_together(parts), tokenizer.encode_apart(parts)
    assert apart == together and all(together)
    assert tokenizer.decode([id for ids in apart for id in ids], skip_special=False).startswith("<|im_start|>user\nadd 1")


def test_numpy_ids_decode(tokenizer):
    assert tokenizer.decode(np.array(tokenizer.encode("abc"), np.uint16)) == "abc"


def test_fastokens_is_used_where_it_agrees(any_tokenizer):
    assert any_tokenizer.bulk.name == "fastokens"


def test_an_encoder_that_differs_on_one_hostile_text_is_left_aside(tokenizer, monkeypatch):
    class NearlyRight(fast.FastokensEncoder):
        def encode_flat(self, texts):
            return super().encode_flat([text.replace("\u212a", "k") for text in texts])  # the Kelvin sign

    assert "\u212a" in "".join(HOSTILE_TEXTS)
    monkeypatch.setattr(fast, "FastokensEncoder", NearlyRight)
    assert fast.bulk_encoder(tokenizer.folder / "tokenizer.json").name == "tokenizers"


def test_a_tokenizer_that_fastokens_cannot_load_is_encoded_with_tokenizers(tokenizer, monkeypatch):
    def refuse(path):
        raise ValueError("unsupported pre-tokenizer")

    monkeypatch.setattr(fast.fastokens.Tokenizer, "from_file", refuse, raising=False)
    assert fast.bulk_encoder(tokenizer.folder / "tokenizer.json").name == "tokenizers"


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_damaged_tokenizer_is_refused(tokenizer, tmp_path):
    shutil.copytree(tokenizer.folder, tmp_path / "damaged")
    path = tmp_path / "damaged" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"tokenizer\.json: this tokenizer is damaged"):
        load_tokenizer(tmp_path / "damaged")


def test_only_one_space_goes_from_the_front_of_a_text():
    """SentencePiece puts one there; the library's Metaspace takes every `▁` out of the first token."""
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    vocabulary = read_vocabulary({"\u2581\u2581a": 0, "\u2581": 1}, {}, metaspace, "Unigram")
    assert [vocabulary.text_bytes(ids, True) for ids in ([0], [1, 0], [1])] == [b" a", b"  a", b""]
    assert vocabulary.text_bytes([0], False) == b"  a"
    steps = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]}
    vocabulary = read_vocabulary({"<0x20>": 0, " b": 1}, {1: " b"}, steps, "Unigram")
    assert [vocabulary.text_bytes([id], True) for id in (0, 1)] == [b" ", b" b"]  # these are the text's own


def test_an_added_token_stands_for_its_own_text_whatever_the_kind():
    """The library reads `é` as the name of the byte E9, and `▁` in a control token as a space."""
    steps = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "Fuse"}]
    for decoder in ({"type": "ByteLevel"}, {"type": "Sequence", "decoders": steps}):
        vocabulary = read_vocabulary({"a": 0, "<｜é\u2581｜>": 1}, {1: "<｜é\u2581｜>"}, decoder, "BPE")
        assert vocabulary.text_bytes([0, 1], True) == "a<｜é\u2581｜>".encode()


def test_an_id_that_names_no_token_stands_for_nothing(tokenizers_by_algorithm, tmp_path):
    folder = folder_like(
        tokenizers_by_algorithm["wordpiece"], tmp_path / "gap", tokenizer_config={"eos_token": "<|endoftext|>"}
    )
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    removed = content["model"]["vocab"].pop("z")
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer, a = load_tokenizer(folder), content["model"]["vocab"]["a"]
    ids = [removed, a, removed, a]
    assert tokenizer.decode(ids) == "a a" == tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids)
    assert StreamingDecoder(tokenizer).feed([removed]) + StreamingDecoder(tokenizer).feed([removed, a]) == "a"


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        ({"type": "BPEDecoder", "suffix": "</w>"}, "BPEDecoder"),
        ({"type": "CTC"}, "CTC"),
        (None, "null"),
        ({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Metaspace", "replacement": "_"}]}, r"Fuse \+ Metaspace"),
        ({"type": "Strip", "content": " ", "start": 1, "stop": 0}, "Strip"),
    ],
)
def test_a_decoder_of_another_kind_is_refused_by_name(decoder, named):
    with pytest.raises(ArtefactError, match=f"^a BPE tokenizer with the decoder {named} is of a kind that is not read"):
        read_vocabulary({"a": 0}, {}, decoder, "BPE")


def test_a_kind_of_vocabulary_that_is_not_read_is_refused_by_name(tokenizer, tmp_path):
    shutil.copytree(tokenizer.folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["decoder"] = {"type": "BPEDecoder", "suffix": "</w>"}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        ArtefactError, match=r"tokenizer\.json: a BPE tokenizer with the decoder BPEDecoder is of a kind that is not"
    ):
        load_tokenizer(tmp_path / "other")


def folder_like(tokenizer, folder, **files):
    """A folder with the tokenizer's `tokenizer.json` and nothing but the given files, JSON or text, beside it."""
    folder.mkdir()
    shutil.copyfile(tokenizer.folder / "tokenizer.json", folder / "tokenizer.json")
    for name, content in files.items():
        suffix = ".jinja" if isinstance(content, str) else ".json"
        (folder / f"{name}{suffix}").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def test_tokenizer_json_alone_is_enough_where_its_special_tokens_have_known_names(published_tokenizers, tmp_path):
    names = {"llama2": ("<s>", ["</s>", "<s>"]), "bert": ("[CLS]", ["[SEP]", "[CLS]"]), "t5": ("</s>", ["</s>"])}
    for shape, (bos, eos) in names.items():
        there = published_tokenizers[shape]
        alone = load_tokenizer(folder_like(there, tmp_path / shape))
        assert alone.decode([alone.bos_id], skip_special=False) == bos
        assert [alone.decode([id], skip_special=False) for id in alone.eos_ids] == eos
        assert alone.encode("a b") == there.encode("a b")
        assert alone.chat_template is None


def test_a_tokenizer_without_a_begin_or_end_token_is_refused_with_what_to_add(published_tokenizers, tmp_path):
    folder = folder_like(published_tokenizers["qwen"], tmp_path / "unnamed")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        ArtefactError, match=r'tokenizer_config\.json: names no begin or end token .* add "bos_token" and "eos_token"'
    ):
        load_tokenizer(folder)


def test_a_text_gets_what_the_file_puts_around_it_and_no_begin_token_more(published_tokenizers):
    qwen, bert = published_tokenizers["qwen"], published_tokenizers["bert"]
    assert qwen.encode("a") == qwen.encode("a", add_bos=False) == qwen.encode_batch(["a"])[0].tolist()
    assert qwen.decode([qwen.bos_id], skip_special=False) == "<|endoftext|>"  # it has none, and so this begins a document
    assert qwen.decode(qwen.eos_ids, skip_special=False) == "<|im_end|><|endoftext|>"
    assert bert.decode(bert.encode("a"), skip_special=False) == "[CLS] a [SEP]"


def test_the_special_tokens_map_says_what_the_configuration_does_not(published_tokenizers, tmp_path):
    there = published_tokenizers["gpt2"]
    named = {"bos_token": {"content": "<|im_end|>", "lstrip": False}, "eos_token": "<|im_end|>"}
    mapped = load_tokenizer(folder_like(there, tmp_path / "map", special_tokens_map=named))
    assert mapped.bos_id == there.vocab_size - 2
    config = {"bos_token": "<|endoftext|>"}
    both = load_tokenizer(folder_like(there, tmp_path / "both", special_tokens_map=named, tokenizer_config=config))
    assert (both.bos_id, both.eos_ids[0]) == (there.vocab_size - 3, there.vocab_size - 2)


def test_a_chat_template_in_a_file_of_its_own_goes_before_that_in_the_configuration(tokenizer, tmp_path):
    config = {"bos_token": "<|endoftext|>", "chat_template": "{{ 'configured' }}"}
    assert (
        load_tokenizer(folder_like(tokenizer, tmp_path / "in", tokenizer_config=config)).chat_template
        == config["chat_template"]
    )
    beside = folder_like(tokenizer, tmp_path / "beside", tokenizer_config=config, chat_template="{{ 'a file' }}")
    assert load_tokenizer(beside).chat_template == "{{ 'a file' }}" == AutoTokenizer.from_pretrained(beside).chat_template
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "talk"}]
    named = folder_like(tokenizer, tmp_path / "named", tokenizer_config={**config, "chat_template": several})
    assert load_tokenizer(named).chat_template == "talk"


@pytest.mark.parametrize(("listed", "more"), [([3, 5, 100_000], [3, 5]), (7, [7]), (None, [])])
def test_the_generation_settings_end_tokens_are_end_tokens(tokenizer, tmp_path, listed, more):
    folder = folder_like(tokenizer, tmp_path / "model", generation_config={"eos_token_id": listed})
    assert load_tokenizer(folder).eos_ids == (*tokenizer.eos_ids, *more)


@pytest.mark.parametrize("shape", ["bert", "gpt2"])
def test_truncation_in_the_file_is_ignored(published_tokenizers, tmp_path, shape):
    folder = folder_like(published_tokenizers[shape], tmp_path / "cut")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    cut, text = load_tokenizer(folder), "a b c d e f g h"
    assert cut.encode(text) == cut.encode_batch([text])[0].tolist() == published_tokenizers[shape].encode(text)


def test_an_encoder_that_differs_on_a_sample_of_the_corpus_is_left_aside(corpus, tokenizers_by_algorithm):
    tokenizer = load_tokenizer(tokenizers_by_algorithm["bpe"].folder)
    tokenizer.check_bulk(corpus)
    assert tokenizer.bulk.name == "fastokens"

    class NearlyRight(fast.FastokensEncoder):
        def encode_flat(self, texts):
            return super().encode_flat([text.replace("Größe", "Grosse") for text in texts])

    tokenizer.bulk = NearlyRight(tokenizer.folder / "tokenizer.json")
    tokenizer.check_bulk(corpus[:1] + [text for text in corpus if "Größe" not in text])
    assert tokenizer.bulk.name == "fastokens"
    tokenizer.check_bulk(corpus)
    assert tokenizer.bulk.name == "tokenizers"


def test_a_long_text_has_the_ids_of_its_parts(tokenizer):
    part = "a text of some words\n"
    repeated = LONG_TEXT // len(part) + 1
    assert tokenizer.encode(part * repeated, add_bos=False) == tokenizer.encode(part, add_bos=False) * repeated


def test_a_text_that_has_more_tokens_than_a_limit_for_sure_has_them(any_tokenizer, corpus, monkeypatch):
    # of the slices of a text of some thousand characters there are many
    monkeypatch.setattr(fast, "_CHARACTERS_PER_PART", 400)
    monkeypatch.setattr("bessemer.tokenization.tokenizer._AT_ENDS", 16)
    tokenizer = any_tokenizer
    draw = random.Random(7)
    texts = [" ".join(corpus)[:9_000], "a" * 9_000, " " * 9_000, "\u2581" * 3_000, "日本語 " * 1_500, "e\u0301" * 3_000]
    texts += ["".join(draw.choices(["ab", " ", "\n", "é", "\u2581", "'s", "12"], k=5_000)) for _ in range(4)]
    for text in texts:
        count = len(tokenizer.encode(text, add_bos=False))
        assert not any(tokenizer.has_more_tokens(text, limit) for limit in (count, count + 1, 2 * count, 10 * count))
        # and it is said of what is far beyond
        assert tokenizer.has_more_tokens(text, count // 4) or count < 1_000


def test_of_a_long_text_only_as_much_is_encoded_as_has_more_tokens(tmp_path):
    spaces = [b" " * 2**power for power in range(1, 13)]
    write_folder(tmp_path, byte_level_bpe([bytes([byte]) for byte in range(256)] + spaces, split="qwen2"), "chatml")
    tokenizer = load_tokenizer(tmp_path)
    encoded = []

    class Counting:
        name = "counting"

        def encode_flat(self, texts):
            encoded.extend(map(len, texts))
            return np.zeros(sum(map(len, texts)), np.uint32), np.array([0, sum(map(len, texts))])

    tokenizer.bulk = Counting()
    # by its bytes it may have as few as 1,700 tokens, of 4,096 spaces each
    assert tokenizer.has_more_tokens("ab " * 2_333_333, 100_000)
    assert sum(encoded) < 200_000
    assert not tokenizer.has_more_tokens("ab " * 1_000, 2_000) and len(encoded) == 2
