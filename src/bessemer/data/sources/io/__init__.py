"""Streams, archives and trees of files, on bounded memory and with limits on hostile input."""
