"""Pictures of web pages and PDFs with what is written about them, as rows that models learn to see from: where they are found,
which of them are worth learning, near-duplicates by perceptual hashes, and the stage that writes them."""
