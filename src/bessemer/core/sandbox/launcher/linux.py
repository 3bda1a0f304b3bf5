"""Confinement by Linux: system calls through `ctypes`, Landlock, a root of its own, and a seccomp filter.

Landlock (kernel's userspace-api/landlock) restricts the files that a process may reach, TCP, signals and abstract sockets. Its
ABI says what it knows: 1 files, 2 renames between folders, 3 truncation, 4 TCP, 5 ioctl on devices, 6 signals and abstract
Unix sockets. UDP is not among them; seccomp refuses sockets.

The new root is a tmpfs with the readable folders bound read-only at their places, four devices, and a scratch tmpfs.

The seccomp filter (`seccomp(2)`, classic BPF) is a list of refused system calls, and ENOSYS for every call newer than this
list, so that a new kernel opens nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2

MACHINE = os.uname().machine
#: System calls by machine; those above 423 have one number everywhere.
_NUMBERS = {
    "x86_64": {"capset": 126, "pivot_root": 155, "unshare": 272},
    "aarch64": {"capset": 91, "pivot_root": 41, "unshare": 97},
}
_COMMON = {
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}


def syscall(name: str, *arguments: int | bytes | None) -> int:
    """The result of a system call. Raises OSError with the call's name."""
    number = _NUMBERS.get(MACHINE, {}).get(name) or _COMMON.get(name)
    if number is None:
        raise OSError(errno.ENOSYS, f"{name}: not known on {MACHINE}")
    return _checked(name, _LIBC.syscall(ctypes.c_long(number), *map(_as_argument, arguments)))


def prctl(option: int, *arguments: int | bytes) -> int:
    """`prctl(2)`; arguments that are left out are 0. Raises OSError."""
    padded = [*arguments, *[0] * (4 - len(arguments))]
    return _checked(f"prctl {option}", _LIBC.prctl(option, *map(_as_argument, padded)))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """`mount(2)`. Raises OSError that names the target."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _checked(f"mount {target}", _LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]))


def unmount(target: str, flags: int) -> None:
    """`umount2(2)`. Raises OSError."""
    _checked(f"umount {target}", _LIBC.umount2(os.fsencode(target), flags))


def _as_argument(value: int | bytes | None) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


def _checked(what: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


#: The first ABI that keeps a file from being truncated through a descriptor for reading.
LEAST_ABI = 3
_ABI_OF_TCP, _ABI_OF_IOCTL, _ABI_OF_SCOPES = 4, 5, 6

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK, _TRUNCATE, _IOCTL_DEV = 1 << 6, 1 << 11, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_TCP_BIND_AND_CONNECT = 0b11
_SIGNALS_AND_ABSTRACT_SOCKETS = 0b11
_VERSION_FLAG = 1
_PATH_BENEATH = 1

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def landlock_abi() -> int:
    """The version of Landlock here; 0 where there is none."""
    try:
        return syscall("landlock_create_ruleset", None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def scopes_signals() -> bool:
    """Whether a confined process is kept from signalling processes outside its domain."""
    return landlock_abi() >= _ABI_OF_SCOPES


def restrict_files(readable: list[str], writable: str) -> None:
    """Confine this process for good: read and execute below `readable`, everything but devices below `writable`.

    Needs no_new_privs. Raises OSError.
    """
    version = landlock_abi()
    rights = (1 << (16 if version >= _ABI_OF_IOCTL else 15)) - 1
    network = _TCP_BIND_AND_CONNECT if version >= _ABI_OF_TCP else 0
    scopes = _SIGNALS_AND_ABSTRACT_SOCKETS if version >= _ABI_OF_SCOPES else 0
    fields = 3 if scopes else 2 if network else 1
    attributes = struct.pack(f"={fields}Q", *(rights, network, scopes)[:fields])
    ruleset = syscall("landlock_create_ruleset", attributes, len(attributes), 0)
    for path in readable:
        _allow_path(ruleset, path, rights & (_EXECUTE | _READ_FILE | _READ_DIR))
    for path in DEVICES:
        _allow_path(ruleset, path, rights & (_READ_FILE | _WRITE_FILE | _TRUNCATE))
    _allow_path(ruleset, writable, rights & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV))
    syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= _FILE_RIGHTS
    syscall("landlock_add_rule", ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
    os.close(place)


SCRATCH = "/sandbox"

_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
#: A place to mount the new root on until it is the root.
_BASES = ("/tmp", "/var/tmp", "/mnt")
_OLD = "/old"
_BYTES_PER_INODE = 4096


def enter_new_root(readable: list[str], disk: int, owner: int) -> None:
    """Make the root and leave the old one. disk: bytes in scratch. owner: the user of scratch.

    Needs a mount namespace of its own and the right to mount in it; Linux 5.12. Raises OSError.
    """
    base = next(path for path in _BASES if os.path.isdir(path))
    mount(None, "/", None, _REC | _PRIVATE)
    mount("tmpfs", base, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir(base + _OLD)
    syscall("pivot_root", os.fsencode(base), os.fsencode(base + _OLD))
    os.chdir("/")
    for path in readable:
        _bind(path, _RDONLY | _NOSUID | _NODEV)
    for path in DEVICES:
        _bind(path, _NOSUID)
    _make_scratch(disk, owner)
    unmount(_OLD, _DETACH)
    os.rmdir(_OLD)
    mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _bind(path: str, attributes: int) -> None:
    """Show a file or folder of the old root at its place, or the same symbolic link. Nothing where there is none."""
    source = _OLD + path
    if not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), path)
        return
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_RDONLY, 0o644))
    mount(source, path, None, _BIND | _REC)
    # struct mount_attr: set, clear, propagation, user namespace
    what = struct.pack("=4Q", attributes, 0, 0, 0)
    syscall("mount_setattr", _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE, what, len(what))


def _make_scratch(disk: int, owner: int) -> None:
    os.mkdir(SCRATCH)
    inodes = max(256, disk // _BYTES_PER_INODE)
    mount("tmpfs", SCRATCH, "tmpfs", _NOSUID | _NODEV, f"size={disk},nr_inodes={inodes},mode=700")
    for name in ("work", "tmp", "shm"):
        os.mkdir(f"{SCRATCH}/{name}")
        os.chown(f"{SCRATCH}/{name}", owner, owner)
    os.chown(SCRATCH, owner, owner)
    if not os.path.lexists("/tmp"):  # it exists if a readable folder lies below it
        os.symlink(f"{SCRATCH}/tmp", "/tmp")
    os.symlink(f"{SCRATCH}/shm", "/dev/shm")


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


def has_filter() -> bool:
    """Whether there is a filter for this kind of machine."""
    return MACHINE in _MACHINES


def install_filter(*, refuse_signals: bool, ignore_metadata: bool) -> None:
    """Filter this process and its descendants for good. Needs no_new_privs. Raises OSError.

    refuse_signals: no signal to anybody, where nothing else keeps them from other processes of the same user.
    ignore_metadata: changes of mode, owner, times and attributes succeed and do nothing, where Landlock lets them pass.
    """
    if not has_filter():
        raise OSError(errno.ENOSYS, f"seccomp: no filter for {MACHINE}")
    instructions = filter_program(refuse_signals, ignore_metadata)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
    # struct sock_fprog
    prctl(PR_SET_SECCOMP, _MODE_FILTER, struct.pack("@HP", len(instructions), ctypes.addressof(code)))


def filter_program(refuse_signals: bool, ignore_metadata: bool, machine: str = MACHINE) -> list[_Instruction]:
    """The filter as instructions: code, jump if true, jump if false, operand."""
    architecture, column = _MACHINES[machine]
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        # x32 calls lie above, too
        (_JUMP_GREATER, 0, 1, _NEWEST),
        _refuse_call(errno.ENOSYS),
        # the C library falls back to `clone`, whose flags a filter can see
        *_when(_CLONE3[column], [_refuse_call(errno.ENOSYS)]),
        *_when(_CLONE[column], [_argument(0), (_JUMP_SET, 0, 1, _NEW_NAMESPACES), _refuse_call(errno.EPERM), _allow_call()]),
        *_when(_SOCKETPAIR[column], _stream_pair_only()),
        *_when(_IOCTL[column], _without_commands(*_TERMINAL_INPUT)),
        *_when(_FCNTL[column], _without_commands(*_SIGNAL_OWNER)),
    ]
    for *numbers, argument in _OWN_PROCESS_ONLY.values():
        instructions += _when(
            numbers[column], [_argument(argument), (_JUMP_EQUAL, 1, 0, 0), _refuse_call(errno.EPERM), _allow_call()]
        )
    refused = [*_REFUSED.values(), *(_SIGNALS.values() if refuse_signals else ())]
    for pair, code in [(pair, errno.EPERM) for pair in refused] + [(pair, 0) for pair in _METADATA.values() if ignore_metadata]:
        number = pair[column]
        if number is not None:
            instructions += _when(number, [_refuse_call(code)])
    return [*instructions, _allow_call()]


def _when(number: int, then: list[_Instruction]) -> list[_Instruction]:
    return [(_JUMP_EQUAL, 0, len(then), number), *then]


def _stream_pair_only() -> list[_Instruction]:
    """Allow pairs of connected stream sockets only, which event loops need. A datagram socket could send to other processes."""
    return [
        _argument(0),
        (_JUMP_EQUAL, 0, 4, _AF_UNIX),
        _argument(1),
        (_AND, 0, 0, _SOCK_TYPE_MASK),
        (_JUMP_EQUAL, 0, 1, _SOCK_STREAM),
        _allow_call(),
        _refuse_call(errno.EPERM),
    ]


def _without_commands(first: int, second: int) -> list[_Instruction]:
    """A call whose second argument is its command, without two of them."""
    return [_argument(1), (_JUMP_EQUAL, 1, 0, first), (_JUMP_EQUAL, 0, 1, second), _refuse_call(errno.EPERM), _allow_call()]


def _argument(index: int) -> _Instruction:
    """Load the low half of an argument, on a little-endian machine."""
    return (_LOAD, 0, 0, 16 + 8 * index)


def _refuse_call(code: int) -> _Instruction:
    return (_RETURN, 0, 0, _ERRNO | code)


def _allow_call() -> _Instruction:
    return (_RETURN, 0, 0, _ALLOW)
