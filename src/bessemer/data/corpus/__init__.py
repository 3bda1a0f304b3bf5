"""Documents on disk: the Parquet files of a corpus, written, read, staged, held out and removed."""
