"""A model held to principles: answers criticised and revised by them, and compared by them (Bai et al. 2022)."""
