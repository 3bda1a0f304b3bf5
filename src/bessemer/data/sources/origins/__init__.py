"""Origins of documents that are no file format: crawls, addresses, the Hub, wheels, a user's function."""
