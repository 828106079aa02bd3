"""Lock the current process down for good: Landlock for files, a seccomp allow-list for everything else, rlimits.

Plain ctypes, standard library only, no privilege needed. `lock_down` may only be called in a single-threaded process
and cannot be undone. It fails closed: each step that the kernel refuses raises `OSError`, and nothing is skipped.
Sources: landlock(7), seccomp(2), and the syscall tables of Linux's asm/unistd_64.h (x86_64) and asm-generic/unistd.h
(aarch64).
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
from collections.abc import Sequence
from typing import NamedTuple

_LIBC = ctypes.CDLL(None, use_errno=True)

# name: (x86_64, aarch64); None where the architecture has no such call.
_SYSCALLS = {
    # files: Landlock decides which ones; no chmod, chown, link, symlink, mkdir, truncate by path, chdir, readlink
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "stat": (4, None),
    "lstat": (6, None),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "pipe2": (293, 59),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "ftruncate": (77, 46),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "brk": (12, 214),
    "madvise": (28, 233),
    # own process only: nothing here takes another process's id
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getpgrp": (111, None),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrusage": (98, 165),
    "times": (100, 153),
    "getrlimit": (97, 163),
    "futex": (202, 98),
    "rseq": (334, 293),
    "set_robust_list": (273, 99),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # time and randomness
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "getrandom": (318, 278),
}

_O_TRUNC = 0o1000


class _ArgumentCheck(NamedTuple):
    """A system call that is allowed for some values of one argument only."""

    numbers: tuple[int, int]  # (x86_64, aarch64)
    argument: int  # counted from 0
    mask: int  # bits of the argument that are compared
    allowed: tuple[int, ...]  # values of these bits


_CHECKED = [
    # openat: reading with O_TRUNC empties a file, which Landlock before its version 3 does not see.
    _ArgumentCheck((257, 56), 2, 3 | _O_TRUNC, (0, 1, 2, 1 | _O_TRUNC, 2 | _O_TRUNC)),
    # fcntl: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. F_SETOWN and F_SETSIG would send signals to others.
    _ArgumentCheck((72, 25), 1, 0xFFFFFFFF, (0, 1, 2, 3, 1030)),
    # ioctl: TCGETS (isatty), FIONCLEX, FIOCLEX
    _ArgumentCheck((16, 29), 1, 0xFFFFFFFF, (0x5401, 0x5450, 0x5451)),
]

# Calls of our own, before the filter is in force.
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_ADD_RULE = 445
_LANDLOCK_RESTRICT_SELF = 446
_CAPSET = (126, 91)
_SECCOMP = (317, 277)

# prctl(2).
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_GET_SECCOMP = 21
_PR_SET_NO_NEW_PRIVS = 38

# column of the tables, AUDIT_ARCH
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Landlock's file rights, include/uapi/linux/landlock.h.
_WRITE_FILE = 1 << 1
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_REMOVE_FILE = 1 << 5
_MAKE_REG = 1 << 8
_TRUNCATE = 1 << 14
_SCRATCH_RIGHTS = _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE
_NUM_RIGHTS = (13, 14, 15, 15, 16)  # that Landlock's versions 1, 2, ... know
_BIND_AND_CONNECT = 3  # of TCP, from version 4 on
_SOCKETS_AND_SIGNALS = 3  # abstract unix sockets and signals outside the sandbox, from version 6 on

_NOT_STDLIB = {"site-packages", "dist-packages"}


def _syscall(number: int, *args: object) -> int:
    result: int = _LIBC.syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise _kernel_error(f"system call {number}")
    return result


def _prctl(option: int, value: int = 0) -> None:
    unused = [ctypes.c_ulong(0)] * 3  # must be 0
    if _LIBC.prctl(option, ctypes.c_ulong(value), *unused) < 0:
        raise _kernel_error(f"prctl {option}")


def _kernel_error(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")


def _landlock_version() -> int:
    only_version = ctypes.c_uint32(1)
    return _syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), only_version)


def _column() -> int:
    column, _ = _MACHINES[os.uname().machine]
    return column


def missing_support() -> str | None:
    """Return why this kernel cannot run the sandbox, or None when it can."""
    system = os.uname()
    if system.sysname != "Linux" or system.machine not in _MACHINES:
        return f"needs Linux on x86_64 or aarch64, this is {system.sysname} on {system.machine}"
    try:
        _landlock_version()
    except OSError as error:
        return f"the kernel lacks Landlock ({error.strerror}); it needs Linux 5.13 or newer with lsm=...,landlock"
    try:
        _prctl(_PR_GET_SECCOMP)
    except OSError as error:
        return f"the kernel lacks seccomp ({error.strerror})"
    return None


def lock_down(readable: Sequence[str], *, cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    """Confine this process: files in its working directory, the standard library in `readable`, no other resource."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # nobody of the same user attaches to this process or reads its /proc entry
    _prctl(_PR_SET_DUMPABLE, 0)
    _set_limits(cpu_s, memory_bytes, file_bytes)
    _drop_capabilities()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)  # without it neither Landlock nor seccomp accepts us
    _restrict_files(readable)
    _restrict_calls()


def _set_limits(cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    # SIGXCPU comes a second before SIGKILL, which distinguishes a timeout from another death.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NPROC: 0,  # no thread or process; root is exempt, and seccomp repeats it
    }
    for name, limit in limits.items():
        resource.setrlimit(name, (limit, limit))


def _drop_capabilities() -> None:
    header = struct.pack("<Ii", 0x20080522, 0)  # version 3 of the interface, this process
    no_capabilities = bytes(24)
    _syscall(_CAPSET[_column()], header, no_capabilities)


def _restrict_files(readable: Sequence[str]) -> None:
    """Landlock: nothing but the paths below, no network, and no signal or socket to others where the kernel can."""
    version = _landlock_version()
    known_version = min(version, len(_NUM_RIGHTS))
    num_rights = _NUM_RIGHTS[known_version - 1]
    # all that the kernel knows: what is not allowed below is denied
    handled = (1 << num_rights) - 1
    # struct landlock_ruleset_attr has grown with the versions.
    attributes = struct.pack("<Q", handled)
    if version >= 4:
        attributes += struct.pack("<Q", _BIND_AND_CONNECT)
    if version >= 6:
        attributes += struct.pack("<Q", _SOCKETS_AND_SIGNALS)
    size = ctypes.c_size_t(len(attributes))
    ruleset = _syscall(_LANDLOCK_CREATE_RULESET, attributes, size, ctypes.c_uint32(0))
    _allow_path(ruleset, ".", _SCRATCH_RIGHTS & handled)
    for root in readable:
        if root.endswith(".zip"):
            _allow_path(ruleset, root, _READ_FILE)
            continue
        _allow_path(ruleset, root, _READ_DIR)
        # One rule an entry, since a rule on the folder would include site-packages.
        for entry in os.scandir(root):
            if entry.name not in _NOT_STDLIB and os.access(entry.path, os.F_OK):
                _allow_path(ruleset, entry.path, _READ_FILE)
    _syscall(_LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    path_beneath = ctypes.c_int(1)  # the kind of rule
    try:
        rule = struct.pack("<Qi", rights, descriptor)
        _syscall(_LANDLOCK_ADD_RULE, ctypes.c_int(ruleset), path_beneath, rule, ctypes.c_uint32(0))
    finally:
        os.close(descriptor)


def _restrict_calls() -> None:
    """Seccomp: the allow-list for this process and whatever it becomes."""
    program = _filter()
    # struct sock_filter
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    prog = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))  # struct sock_fprog
    set_mode_filter = ctypes.c_uint(1)
    _syscall(_SECCOMP[_column()], set_mode_filter, ctypes.c_uint(0), prog)


# Classic BPF: an instruction is (code, jump if true, jump if false, operand), and jumps count instructions.
_Instruction = tuple[int, int, int, int]
_LOAD, _EQUAL, _MASK, _RETURN = 0x20, 0x15, 0x54, 0x06
_ALLOW = (_RETURN, 0, 0, 0x7FFF0000)
_DENY = (_RETURN, 0, 0, 0x00050000 | errno.EPERM)
_KILL_PROCESS = (_RETURN, 0, 0, 0x80000000)
_LOAD_NUMBER = (_LOAD, 0, 0, 0)
_LOAD_ARCHITECTURE = (_LOAD, 0, 0, 4)


def _filter() -> list[_Instruction]:
    """Return the allow-list as a program."""
    column, architecture = _MACHINES[os.uname().machine]
    # Numbers mean other calls on another architecture.
    program = [_LOAD_ARCHITECTURE, (_EQUAL, 1, 0, architecture), _KILL_PROCESS, _LOAD_NUMBER]
    for numbers in _SYSCALLS.values():
        number = numbers[column]
        if number is not None:
            program += [(_EQUAL, 0, 1, number), _ALLOW]
    for check in _CHECKED:
        verdict = _argument_verdict(check)
        program.append((_EQUAL, 0, len(verdict), check.numbers[column]))
        program += verdict
    return [*program, _DENY]


def _argument_verdict(check: _ArgumentCheck) -> list[_Instruction]:
    """Return the instructions that end a call by the value of its argument."""
    low_half = 16 + 8 * check.argument  # of a little-endian argument
    verdict = [(_LOAD, 0, 0, low_half), (_MASK, 0, 0, check.mask)]
    for value in check.allowed:
        verdict += [(_EQUAL, 0, 1, value), _ALLOW]
    return [*verdict, _DENY]
