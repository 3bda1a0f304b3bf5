"""Tokenization: training of seven algorithms, encoding, decoding, token shards, chat templates, formats of other tools."""
