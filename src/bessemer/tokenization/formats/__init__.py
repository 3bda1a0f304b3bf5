"""Tokenizers of other tools: read into a Hugging Face folder with their ids kept, and written from one."""
