"""Data refinery: raw text to clean documents, in the stages collect, clean, select and deduplicate.

Each stage reads and writes a folder of documents (`corpus/reader.py`) that DuckDB, Polars, Daft and `datasets` open too.
"""
