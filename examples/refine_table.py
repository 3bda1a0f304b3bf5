"""Clean, select and deduplicate a table in memory: `python refine_table.py`. Needs the extra data."""

import pyarrow as pa

import bessemer

PROSE = (
    "The furnace has to be heated with care, and the masters that have seen it burn know of ways to tell by the flame when "
    "the carbon of the raw iron is gone. With each of the blows the light that the melt throws on the walls goes from red to "
    "white, and the men have to be quick to turn the vessel before the iron begins to burn. Write to master@example.org."
)
OTHER = (
    "A tokenizer cuts text into tokens that a model can count, and it learns which tokens to have from the text itself. It "
    "begins with bytes, looks for the pair that stands together most often, and makes a new token of it, again and again, "
    "until the vocabulary is as large as it was asked to be. Rare words are then spelt out, and common ones are one token."
)

documents = pa.table({"text": [PROSE, OTHER, PROSE, "Click here! Buy now! " * 30, "Too short."]})
kept, rejected = bessemer.refine(
    documents,
    {
        "clean": {"edit": ["personal_data"], "score": ["language", "gopher_quality", "gopher_repetition"]},
        "select": {"keep": ["gopher"], "languages": ["en"]},
        "deduplicate": ["exact", "minhash"],
    },
)

print(f"{kept.num_rows} of {documents.num_rows} kept")
for row in kept.select(["text", "gopher_words"]).to_pylist():
    print(f"  {row['gopher_words']:.0f} words: …{row['text'][-60:]}")
for row in rejected.select(["text", "rejected_by", "reason"]).to_pylist():
    print(f"  {row['rejected_by']}, {row['reason']}: {row['text'][:40]}…")
