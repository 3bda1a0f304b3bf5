"""Tokenizers of other tools: read into a Hugging Face folder with their ids kept, and written from one."""

from bessemer.tokenization.formats.exchange import FORMATS, Format, export_tokenizer, import_tokenizer

__all__ = ["FORMATS", "Format", "export_tokenizer", "import_tokenizer"]
