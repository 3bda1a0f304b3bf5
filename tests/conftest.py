"""Settings that PyTorch reads once, when it is loaded: those that the command line makes; and those of hypothesis."""

from hypothesis import settings

from bessemer.core.environment import set_environment

set_environment()

# How long an example takes depends on what else the machine does: no deadline, unless a test has one of its own.
settings.register_profile("bessemer", deadline=None)
settings.load_profile("bessemer")
