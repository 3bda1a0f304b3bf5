"""Models on disk: Hugging Face folders, weights files, the local library."""
