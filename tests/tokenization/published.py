"""Tokenizer folders in the shapes of published models, trained by the `tokenizers` library on a small corpus."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPACES = decoders.Replace("\u2581", " ")


def write_published(folder, shape, corpus):
    """Write the folder of one of `SHAPES`."""
    tokenizer, settings = SHAPES[shape](corpus)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _llama2(corpus):
    """SentencePiece BPE with byte fallback; a space before every text that decoding strips; `<s>` before it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    controls = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, special_tokens=[*controls, *_BYTES]))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence([_SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _unigram(corpus, normalizer, pre_tokenizer, decoder, byte_fallback):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"])
    tokenizer.train_from_iterator(corpus, trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] += [[name, -30.0] for name in _BYTES] if byte_fallback else []
    content["model"]["byte_fallback"] = byte_fallback
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoder
    return tokenizer, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def _t5(corpus):
    """Unigram without byte fallback, normalised, Metaspace with a space before every text, `</s>` after it."""
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    metaspace = {"prepend_scheme": "always"}
    tokenizer, settings = _unigram(
        corpus, normalizer, pre_tokenizers.Metaspace(**metaspace), decoders.Metaspace(**metaspace), byte_fallback=False
    )
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer, settings


def _unigram_nfkc(corpus):
    """Unigram with byte fallback, whose normalizer changes lengths."""
    decoder = decoders.Sequence([_SPACES, decoders.ByteFallback(), decoders.Fuse()])
    return _unigram(corpus, normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="never"), decoder, byte_fallback=True)


def _bert(corpus):
    """WordPiece in lower case without accents, between `[CLS]` and `[SEP]`, with a decoder that mends spaces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    controls = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=400, special_tokens=controls))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer, {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}


def _byte_level(corpus, normalizer, add_prefix_space):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False), AddedToken("<|im_end|>", normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def _gpt2(corpus):
    """Byte-level BPE with a space before every text."""
    return _byte_level(corpus, None, True), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def _qwen(corpus):
    """Byte-level BPE of text in NFC, no begin token, turns that end in `<|im_end|>`, `<think>` an added token of text."""
    tokenizer = _byte_level(corpus, normalizers.NFC(), False)
    return tokenizer, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


SHAPES = {"llama2": _llama2, "t5": _t5, "unigram-nfkc": _unigram_nfkc, "bert": _bert, "gpt2": _gpt2, "qwen": _qwen}
