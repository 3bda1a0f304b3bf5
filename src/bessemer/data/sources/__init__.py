"""Where documents come from: wheels, the standard library, files, a user's own function."""
