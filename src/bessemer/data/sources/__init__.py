"""Sources of documents: files, archives, crawls, the Hub, wheels, the standard library, a function of the user.

`io/` reads their bytes: streams, archives, trees of files, HTTP.
"""
