"""`python -m bessemer`."""

from bessemer.cli.main import main

main()
