"""Settings that PyTorch reads once, when it is loaded: those that the command line makes."""

from bessemer.cli.main import set_environment

set_environment()
