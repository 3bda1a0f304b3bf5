"""Streams, archives, trees of files and HTTP requests, on bounded memory and with limits on hostile input."""
