"""Where code is run that nobody has read: generated programs, tests of them, tools.

Three sides: the caller (`execution.py`) starts a launcher for each run and keeps the clock; the launcher (`launcher/`) confines
a process and waits for it; the program knows nothing of either.
"""

from bessemer.core.sandbox.execution import Result
from bessemer.core.sandbox.resources import Limits
from bessemer.core.sandbox.sandbox import Program, Sandbox, strongest_tier
from bessemer.core.sandbox.tiers import Gap, SandboxError, Tier

__all__ = ["Gap", "Limits", "Program", "Result", "Sandbox", "SandboxError", "Tier", "strongest_tier"]
