"""Drawings, pages and printed tables of plain data, for the report, `bessemer show` and `bessemer inspect`."""
