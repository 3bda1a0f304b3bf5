"""Tiers of confinement, in order, and the known gaps of each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from bessemer.core.errors import BessemerError, ConfigError


class SandboxError(BessemerError):
    """This machine has no sandbox that is strong enough, or the sandbox could not start the program."""


class Tier(StrEnum):
    """A tier, named after its strongest mechanism. Each includes the mechanisms of those after it.

    NAMESPACES: user, PID, network, IPC and mount namespaces; a root that holds the Python installation and a scratch tmpfs.
    LANDLOCK: Landlock, over the machine's own files.
    SECCOMP: a filter of system calls: no sockets.
    RLIMITS: limits, no_new_privs, a clean environment, closed descriptors and, for root, a user of its own.
    """

    NAMESPACES = "namespaces"
    LANDLOCK = "landlock"
    SECCOMP = "seccomp"
    RLIMITS = "rlimits"

    def at_least(self, other: Tier) -> bool:
        """Whether this tier is as strong as `other` or stronger."""
        return _ORDER.index(self) <= _ORDER.index(other)

    def and_weaker(self) -> list[Tier]:
        """This tier and those below it, strongest first."""
        return _ORDER[_ORDER.index(self) :]

    @classmethod
    def parse(cls, name: str) -> Tier:
        """A tier by its name. Raises ConfigError."""
        try:
            return cls(name)
        except ValueError:
            raise ConfigError(f"no sandbox tier {name!r}; the tiers are {', '.join(cls)}") from None


_ORDER = list(Tier)


@dataclass(frozen=True)
class Gap:
    """Something that a tier does not prevent.

    hazard: one word for it. text: what a program can do. tiers: where.
    own_user: only where the program runs as the caller's own user, because the caller is not root. macos_only: only there.
    """

    hazard: str
    text: str
    tiers: tuple[Tier, ...]
    own_user: bool = False
    macos_only: bool = False


_WITHOUT_NAMESPACES = (Tier.LANDLOCK, Tier.SECCOMP, Tier.RLIMITS)
_WITHOUT_FILES = (Tier.SECCOMP, Tier.RLIMITS)

#: All known gaps. The kernel's own mistakes and the timing of a shared processor are gaps of every tier.
GAPS = (
    Gap("existence", "see whether a file outside exists, its size and its times", _WITHOUT_NAMESPACES),
    Gap("deleted", "hold disk by files that are deleted and open, up to open_files × disk a process", _WITHOUT_NAMESPACES),
    Gap("burst", "go over the limits on disk and memory for 50 ms, until the caller looks", _WITHOUT_NAMESPACES),
    Gap("public", "read what every user may read, and write to folders that everybody may write to", _WITHOUT_FILES),
    Gap("home", "read, change and delete all files of the user", _WITHOUT_FILES, own_user=True),
    Gap("environment", "read the environment and the memory of the user's other processes", _WITHOUT_FILES, own_user=True),
    Gap("network", "open sockets to this machine and to others", (Tier.RLIMITS,)),
    Gap(
        "signals",
        "stop the user's other processes, the sandbox's own too, and so outlive its run",
        (Tier.RLIMITS,),
        own_user=True,
    ),
    Gap("kernel", "use the kernel's rarer interfaces: user namespaces, bpf, io_uring, keys", (Tier.RLIMITS,)),
    Gap("privilege", "run setuid programs", (Tier.RLIMITS,), macos_only=True),
    Gap("daemon", "outlive its run, in a session of its own", (Tier.RLIMITS,), macos_only=True),
    Gap("processes", "start as many processes as the user may", (Tier.RLIMITS,), macos_only=True),
    Gap("memory", "use all memory", (Tier.RLIMITS,), macos_only=True),
)


def gaps(tier: Tier, *, own_user: bool, macos: bool) -> list[Gap]:
    """The gaps of a tier for a caller and a system of this kind."""
    return [gap for gap in GAPS if tier in gap.tiers and (own_user or not gap.own_user) and (macos or not gap.macos_only)]
