"""The filter: a pure function from a batch of texts to columns."""

import pyarrow as pa

from bessemer.data.text.texts import Texts


def shouting(texts: Texts) -> dict[str, pa.Array]:
    """The share of the letters that are capitals, per text; 0 where there are no letters."""
    shares = []
    for text in texts.array.to_pylist():
        letters = [character for character in text if character.isalpha()]
        shares.append(sum(map(str.isupper, letters)) / len(letters) if letters else 0.0)
    return {"shouting_capitals": pa.array(shares, pa.float64())}
