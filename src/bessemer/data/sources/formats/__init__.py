"""File formats as sources read them."""
