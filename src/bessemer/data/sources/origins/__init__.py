"""Sources that are not a file format: crawls, addresses, the Hub, wheels, a user's function."""
