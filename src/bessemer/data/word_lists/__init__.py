"""Word and pattern lists: the files, how they are read, and the search for all their terms in one pass.

The files travel in the wheel; a user's own have the same form. A category's terms serve the corpus filters and the
safety policy alike, so that "violence" means one thing in the whole system.
"""
