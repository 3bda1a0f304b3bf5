"""Data refinery: raw text to clean documents, in the stages collect, clean, deduplicate and select.

Each stage reads and writes a folder of documents (`documents.py`) that DuckDB, Polars, Daft and `datasets` open too.
"""
