"""Documents on disk: Parquet files of a corpus, written, read, staged, held out and removed."""
