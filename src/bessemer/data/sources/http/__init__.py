"""Polite fetching: one limited HTTP request at a time, robots.txt, a store of fetched pages."""
