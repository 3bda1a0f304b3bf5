"""Sandbox for untrusted code: generated programs, their tests, tools.

For each run the caller (`execution.py`) starts a launcher and enforces time limits. The launcher (`launcher/`) confines a
process, which becomes the program, and waits for it.
"""

from bessemer.core.sandbox.execution import Result
from bessemer.core.sandbox.resources import Limits
from bessemer.core.sandbox.sandbox import Program, Sandbox, strongest_tier
from bessemer.core.sandbox.tiers import Gap, SandboxError, Tier

__all__ = ["Gap", "Limits", "Program", "Result", "Sandbox", "SandboxError", "Tier", "strongest_tier"]
