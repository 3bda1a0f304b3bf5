import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bessemer.core.errors import ArtefactError
from bessemer.tokenization.formats.exchange import export_tokenizer, import_tokenizer
from bessemer.tokenization.formats.sentencepiece_file import import_sentencepiece, write_sentencepiece
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.cases import slow_but

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
#: Models in the shape of published ones, and with settings that are rarer.
BPE = {"model_type": "bpe", **PLAIN}
CODE = {"byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True}
SHAPES = {
    "llama2": {**BPE, **CODE},
    "gemma": {
        **BPE,
        **CODE,
        "add_dummy_prefix": False,
        **dict(zip(("pad_id", "eos_id", "bos_id", "unk_id"), range(4), strict=True)),
        "control_symbols": ["<2mass>"],
        "user_defined_symbols": ["<mask>", "<sep>", "\n", "\n\n", "▁▁", "▁▁▁"],
    },
    "across words": {**BPE, "byte_fallback": True, "split_by_whitespace": False},
    "no bytes": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "unigram": {"model_type": "unigram", "byte_fallback": True, "user_defined_symbols": ["▁▁"], **PLAIN},
    "unigram, one space": {
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["<sep>", "<x y>"],
    },
    "unigram, no prefix": {
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<sep>"],
    },
}
T5 = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}

FRAGMENTS = [*("<sep>", "<x y>", "<mask>", "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<0x", "s>", "<", ">", " ", "  ", "\n")]
FRAGMENTS += ["\n\n\n", "\t", *"abeinst01é日", "ing", "tion", " the", "\0"]


def model_file(path, corpus, **options):
    model = io.BytesIO()
    lines = [line for text in corpus for line in text.splitlines()]
    settings = {"vocab_size": 620, "hard_vocab_limit": False, "num_threads": 2, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def models(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for shape, options in SHAPES.items():
        library = model_file(folder / f"{shape}.model", corpus, **options)
        import_tokenizer(folder / f"{shape}.model", folder / shape)
        found[shape] = load_tokenizer(folder / shape), library
    return found


@pytest.fixture(scope="module", params=slow_but(["llama2", "gemma", "unigram"], SHAPES))
def pair(request, models):
    """A tokenizer that was imported, and the sentencepiece library on the file."""
    return models[request.param]


def differing(ours, library, texts):
    """Texts with other ids, but for segmentations that score alike: which wins is up to the rounding of float32 sums."""
    found, ties = [], 0
    for text in texts:
        mine, theirs = ours.encode(text, add_bos=False), library.encode(text)
        if mine != theirs:
            scores = [sum(map(library.get_score, ids)) for ids in (mine, theirs)]
            alike = abs(scores[0] - scores[1]) < 1e-4 and library.decode(mine) == library.decode(theirs)
            ties += alike
            found += [] if alike else [text]
    return found, ties


def test_ids_equal_sentencepieces(pair, corpus, hostile_texts):
    texts = [*corpus, *(text for text in hostile_texts[:2000] if "\u2581" not in text)]
    others, ties = differing(*pair, texts)
    assert others == []
    assert ties <= (0.005 * len(texts) if type(pair[0]._tokenizer.model).__name__ == "Unigram" else 0)


# by default every shape encodes the corpus and the hostile texts
@pytest.mark.parametrize("pair", slow_but(["unigram", "llama2"], SHAPES), indirect=True)
@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join))
def test_ids_equal_sentencepieces_on_anything_typed(pair, text):
    ours, library = pair
    text = text.replace("\u2581", "")
    assert differing(ours, library, [text])[0] == []
    ids = library.encode(text)
    if library.unk_id() not in ids:
        assert ours.decode(ids) == library.decode(ids)


def test_control_tokens_keep_their_ids_and_roles(models):
    ours, library = models["gemma"]
    assert (ours.bos_id, ours.eos_ids) == (library.bos_id(), (library.eos_id(), library.bos_id()))
    assert {ours.is_special(id) for id in (0, 1, 2, 3, library.piece_to_id("<2mass>"))} == {True}
    assert not ours.is_special(library.piece_to_id("<sep>"))
    assert ours.vocab_size == library.vocab_size()
    assert ours.encode("a")[0] == library.bos_id()


def test_autotokenizer_reads_what_was_imported(pair, hostile_texts):
    ours, _ = pair
    peer = AutoTokenizer.from_pretrained(ours.folder)
    texts = hostile_texts[:300]
    assert peer(texts, split_special_tokens=True)["input_ids"] == [ours.encode(text) for text in texts]


def test_an_imported_model_is_written_again_with_the_same_ids(pair, tmp_path, hostile_texts):
    ours, library = pair
    export_tokenizer(ours.folder, tmp_path / "again.model", "sentencepiece")
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "again.model"))
    texts = [text for text in hostile_texts[2000:2500] if "\u2581" not in text]
    others, ties = differing(ours, again, texts)
    assert others == []
    assert ties <= 0.005 * len(texts)
    for role in ("bos_id", "eos_id", "pad_id", "unk_id"):
        assert getattr(again, role)() == getattr(library, role)()


def test_unicode_maps_differ_on_rare_combinations_only(corpus, tmp_path, hostile_texts):
    """T5's: NFKC by a map of SentencePiece's own. Every third hostile string is not NFC, with marks on rare characters."""
    library = model_file(tmp_path / "t5.model", corpus, byte_fallback=True, **T5)
    foreign = import_sentencepiece(tmp_path / "t5.model")
    foreign.write(tmp_path / "t5")
    ours = load_tokenizer(tmp_path / "t5")
    assert "combining mark" in foreign.notes[0]
    assert (ours.bos_id, ours.eos_ids) == (library.eos_id(), (library.eos_id(),))
    assert differing(ours, library, [*corpus, "ﬁ ①  e\u0301 ～ \u1100\u1161\u11a8 \u3000x", "\u212b \u00a0 "])[0] == []
    texts = [text for text in hostile_texts[:3000] if "\u2581" not in text]
    assert len(differing(ours, library, texts)[0]) < 0.04 * len(texts)


def test_control_tokens_of_an_exported_tokenizer_are_found_by_id_and_not_in_text(tokenizers_by_algorithm, tmp_path):
    ours = tokenizers_by_algorithm["unigram"]
    write_sentencepiece(ours.folder, tmp_path / "tokenizer.model")
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert library.bos_id() == library.eos_id() == library.pad_id() == ours.bos_id
    assert [library.id_to_piece(id) for id in ours.eos_ids] == ["<|endoftext|>", "<|im_end|>"]
    assert library.is_control(ours.bos_id)
    assert ours.bos_id not in library.encode("<|endoftext|>")
    import_tokenizer(tmp_path / "tokenizer.model", tmp_path / "back")
    back = load_tokenizer(tmp_path / "back")
    assert back.encode("a<|im_end|> <0x41>\n") == ours.encode("a<|im_end|> <0x41>\n")


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "character"])
def test_tokenizers_of_another_kind_are_not_exported(tokenizers_by_algorithm, tmp_path, algorithm):
    with pytest.raises(ArtefactError, match="cannot be written as a SentencePiece model"):
        write_sentencepiece(tokenizers_by_algorithm[algorithm].folder, tmp_path / "x.model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "word", "vocab_size": 50}, "model type WORD"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "spaces after words"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused_with_the_reason(corpus, tmp_path, options, reason):
    model_file(tmp_path / "x.model", corpus, **options)
    with pytest.raises(ArtefactError, match=reason):
        import_sentencepiece(tmp_path / "x.model")


def test_a_damaged_model_is_refused(corpus, tmp_path):
    path = tmp_path / "x.model"
    model_file(path, corpus, model_type="bpe")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ArtefactError, match="damaged"):
        import_sentencepiece(path)
    path.write_bytes(b"")
    with pytest.raises(ArtefactError, match="holds no SentencePiece model"):
        import_sentencepiece(path)
