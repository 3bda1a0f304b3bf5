"""Inspect's two plugs, which it finds by the entry point `inspect_ai`: `bessemer/MODEL` as a model, `bessemer` as a sandbox.

inspect eval task.py --model bessemer/smollm2 --sandbox bessemer
"""

from bessemer.evaluation.inspect_model import BessemerAPI
from bessemer.evaluation.inspect_sandbox import BessemerSandbox, SandboxSettings

__all__ = ["BessemerAPI", "BessemerSandbox", "SandboxSettings"]
