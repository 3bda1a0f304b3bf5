"""Examples for every method: formats, files, encoding, packing, splitting."""
