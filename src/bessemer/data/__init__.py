"""Raw text to clean documents: collect, clean, deduplicate, select.

Each stage reads and writes a folder of documents (`documents.py`) that DuckDB, Polars, Daft and `datasets` open too.
"""
