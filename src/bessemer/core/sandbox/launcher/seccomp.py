"""A seccomp filter: which system calls a confined program has (`seccomp(2)`, classic BPF).

A list of refusals, and ENOSYS for every call newer than this list, so that a new kernel opens nothing.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from .libc import MACHINE, PR_SET_SECCOMP, prctl

#: What the kernel calls each machine (`linux/audit.h`), and the column of the tables below.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_NEWEST = 462

#: Refused with EPERM. name: number on x86-64, on AArch64 (None: not there).
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # sockets
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "kcmp": (312, 272), "pidfd_getfd": (438, 438), "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # mounts, roots, files by handle
    "mount": (165, 40), "umount2": (166, 39), "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "pivot_root": (155, 41),
    "chroot": (161, 51), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "statmount": (457, 457),
    "listmount": (458, 458), "quotactl": (179, 60), "quotactl_fd": (443, 443), "fanotify_init": (300, 262),
    # namespaces
    "unshare": (272, 97), "setns": (308, 268),
    # code and events in the kernel, keys
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    # memory that no limit of the process counts, or that is another's
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # the machine
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "personality": (135, 92), "vhangup": (153, 58), "syslog": (103, 116), "uselib": (134, None),
}  # fmt: skip
#: Only with 0, this process, as the argument of that index.
_OWN_PROCESS_ONLY: dict[str, tuple[int, int, int]] = {
    "prlimit64": (302, 261, 0), "sched_setaffinity": (203, 122, 0), "sched_setparam": (142, 118, 0),
    "sched_setscheduler": (144, 119, 0), "sched_setattr": (314, 274, 0), "setpriority": (141, 140, 1),
    "ioprio_set": (251, 30, 1),
}  # fmt: skip
_SIGNALS: dict[str, tuple[int | None, int | None]] = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
}  # fmt: skip
_METADATA: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "utimensat": (280, 88), "futimesat": (261, None), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
_CLONE, _CLONE3, _SOCKETPAIR, _IOCTL, _FCNTL = (56, 220), (435, 435), (53, 199), (16, 29), (72, 25)

_NEW_NAMESPACES = 0x7E020080  # CLONE_NEW{USER,PID,NET,IPC,UTS,CGROUP,NS,TIME}
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF
#: Commands: characters typed into a terminal in the user's name (TIOCSTI, TIOCLINUX); signals of input to another process
#: (F_SETOWN, F_SETOWN_EX).
_TERMINAL_INPUT, _SIGNAL_OWNER = (0x5412, 0x541C), (8, 15)

_LOAD, _AND, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_SET, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x45, 0x06
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_MODE_FILTER = 2
_NUMBER, _ARCHITECTURE = 0, 4

_Instruction = tuple[int, int, int, int]


def known() -> bool:
    """Whether there is a filter for this kind of machine."""
    return MACHINE in _MACHINES


def install(*, refuse_signals: bool, ignore_metadata: bool) -> None:
    """Filter this process and its descendants for good. Needs no_new_privs. Raises OSError.

    refuse_signals: no signal to anybody, where nothing else keeps them from other processes of the same user.
    ignore_metadata: changes of mode, owner, times and attributes succeed and do nothing, where Landlock lets them pass.
    """
    if not known():
        raise OSError(errno.ENOSYS, f"seccomp: no filter for {MACHINE}")
    instructions = program(refuse_signals, ignore_metadata)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
    # struct sock_fprog
    prctl(PR_SET_SECCOMP, _MODE_FILTER, struct.pack("@HP", len(instructions), ctypes.addressof(code)))


def program(refuse_signals: bool, ignore_metadata: bool, machine: str = MACHINE) -> list[_Instruction]:
    """The filter as instructions: code, jump if true, jump if false, operand."""
    architecture, column = _MACHINES[machine]
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        # x32 calls lie above, too
        (_JUMP_GREATER, 0, 1, _NEWEST),
        _error(errno.ENOSYS),
        # the C library falls back to `clone`, whose flags a filter can see
        *_when(_CLONE3[column], [_error(errno.ENOSYS)]),
        *_when(_CLONE[column], [_argument(0), (_JUMP_SET, 0, 1, _NEW_NAMESPACES), _error(errno.EPERM), _allow()]),
        *_when(_SOCKETPAIR[column], _stream_pair_only()),
        *_when(_IOCTL[column], _without_commands(*_TERMINAL_INPUT)),
        *_when(_FCNTL[column], _without_commands(*_SIGNAL_OWNER)),
    ]
    for *numbers, argument in _OWN_PROCESS_ONLY.values():
        instructions += _when(numbers[column], [_argument(argument), (_JUMP_EQUAL, 1, 0, 0), _error(errno.EPERM), _allow()])
    refused = [*_REFUSED.values(), *(_SIGNALS.values() if refuse_signals else ())]
    for pair, code in [(pair, errno.EPERM) for pair in refused] + [(pair, 0) for pair in _METADATA.values() if ignore_metadata]:
        number = pair[column]
        if number is not None:
            instructions += _when(number, [_error(code)])
    return [*instructions, _allow()]


def _when(number: int, then: list[_Instruction]) -> list[_Instruction]:
    return [(_JUMP_EQUAL, 0, len(then), number), *then]


def _stream_pair_only() -> list[_Instruction]:
    """A pair of connected stream sockets reaches nobody, and event loops wake up by one. Datagrams can be sent elsewhere."""
    return [
        _argument(0),
        (_JUMP_EQUAL, 0, 4, _AF_UNIX),
        _argument(1),
        (_AND, 0, 0, _SOCK_TYPE_MASK),
        (_JUMP_EQUAL, 0, 1, _SOCK_STREAM),
        _allow(),
        _error(errno.EPERM),
    ]


def _without_commands(first: int, second: int) -> list[_Instruction]:
    """A call whose second argument is its command, without two of them."""
    return [_argument(1), (_JUMP_EQUAL, 1, 0, first), (_JUMP_EQUAL, 0, 1, second), _error(errno.EPERM), _allow()]


def _argument(index: int) -> _Instruction:
    """Load the low half of an argument, on a little-endian machine."""
    return (_LOAD, 0, 0, 16 + 8 * index)


def _error(code: int) -> _Instruction:
    return (_RETURN, 0, 0, _ERRNO | code)


def _allow() -> _Instruction:
    return (_RETURN, 0, 0, _ALLOW)
