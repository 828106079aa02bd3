"""Lock the current process down for good: Landlock for files, a seccomp allow-list for everything else, rlimits.

Plain ctypes, standard library only, no privilege needed. `lock_down` may only be called in a single-threaded process
and cannot be undone. It fails closed: each step that the kernel refuses raises `OSError`, and nothing is skipped.
Sources: landlock(7), seccomp(2), and the syscall tables of Linux's asm/unistd_64.h (x86_64) and asm-generic/unistd.h
(aarch64).
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Sequence

_LIBC = ctypes.CDLL(None, use_errno=True)

# name: (x86_64, aarch64); -1 where the architecture has no such call.
_SYSCALLS = {
    # files: Landlock decides which ones; no chmod, chown, link, symlink, mkdir, truncate by path, chdir, readlink
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "stat": (4, -1), "lstat": (6, -1), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "access": (21, -1), "faccessat": (269, 48), "faccessat2": (439, 439), "pipe2": (293, 59),
    "dup": (32, 23), "dup2": (33, -1), "dup3": (292, 24), "getdents64": (217, 61), "getcwd": (79, 17),
    "unlink": (87, -1), "unlinkat": (263, 35), "rename": (82, -1), "renameat": (264, 38), "renameat2": (316, 276),
    "ftruncate": (77, 46), "poll": (7, -1), "ppoll": (271, 73), "select": (23, -1), "pselect6": (270, 72),
    # memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "brk": (12, 214),
    "madvise": (28, 233),
    # own process only: nothing here takes another process's id
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getpgrp": (111, -1), "uname": (63, 160), "sysinfo": (99, 179),
    "getrusage": (98, 165), "times": (100, 153), "getrlimit": (97, 163), "futex": (202, 98), "rseq": (334, 293),
    "set_robust_list": (273, 99), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94),
    # time and randomness
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, -1),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "getrandom": (318, 278),
}  # fmt: skip

_O_TRUNC, _CLONE_THREAD = 0o1000, 0x10000
# (x86_64, aarch64), argument, mask, allowed values of (argument & mask).
_CONDITIONAL = [
    # Reading with O_TRUNC empties a file, which Landlock before its version 3 does not see.
    ((257, 56), 2, 3 | _O_TRUNC, (0, 1, 2, 1 | _O_TRUNC, 2 | _O_TRUNC)),  # openat
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. F_SETOWN and F_SETSIG would send signals to others.
    ((72, 25), 1, 0xFFFFFFFF, (0, 1, 2, 3, 1030)),  # fcntl
    ((16, 29), 1, 0xFFFFFFFF, (0x5401, 0x5450, 0x5451)),  # ioctl: TCGETS (isatty), FIONCLEX, FIOCLEX
]
_CLONE_THREADS_ONLY = ((56, 220), 0, _CLONE_THREAD, (_CLONE_THREAD,))
_CLONE3 = 435  # its flags lie behind a pointer that seccomp cannot read: ENOSYS makes libc fall back to clone

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH

# Landlock's file rights, include/uapi/linux/landlock.h.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = 1, 2, 4, 8, 1 << 5, 1 << 8, 1 << 14
_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_SCRATCH_RIGHTS = _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE
_NOT_STDLIB = {"site-packages", "dist-packages"}


def _syscall(number: int, *args: object) -> int:
    result: int = _LIBC.syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(option: int, *args: int) -> int:
    padded = [*args, 0, 0, 0, 0][:4]
    result: int = _LIBC.prctl(option, *(ctypes.c_ulong(value) for value in padded))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")
    return result


def missing_support() -> str | None:
    """Return why this kernel cannot run the sandbox, or None when it can."""
    system = os.uname()
    if system.sysname != "Linux" or system.machine not in _MACHINES:
        return f"needs Linux on x86_64 or aarch64, this is {system.sysname} on {system.machine}"
    try:
        _syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))  # landlock_create_ruleset, asked for its version
    except OSError as error:
        return f"the kernel lacks Landlock ({error.strerror}); it needs Linux 5.13 or newer with lsm=...,landlock"
    try:
        _prctl(21)  # PR_GET_SECCOMP
    except OSError as error:
        return f"the kernel lacks seccomp ({error.strerror})"
    return None


def lock_down(
    scratch: str, readable: Sequence[str], *, cpu_s: int, memory_bytes: int, file_bytes: int, threads: bool
) -> None:
    """Confine this process: files under `scratch` (flat), the standard library in `readable`, no other resource."""
    _die_with_parent_and_keep_to_oneself()
    _set_limits(cpu_s, memory_bytes, file_bytes, threads)
    _drop_capabilities()
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS, without which neither Landlock nor seccomp accepts us
    _landlock(scratch, readable)
    _seccomp(threads)


def _die_with_parent_and_keep_to_oneself() -> None:
    _prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    _prctl(4, 0)  # PR_SET_DUMPABLE: nobody of the same user attaches to this process or reads its /proc entry


def _set_limits(cpu_s: int, memory_bytes: int, file_bytes: int, threads: bool) -> None:
    for name, soft, hard in [
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),  # SIGXCPU first, to tell a timeout from another death
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ]:
        resource.setrlimit(name, (soft, hard))
    if not threads:  # counts the user's processes, so it can only say none; root is exempt, and seccomp repeats it
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _drop_capabilities() -> None:
    column, _ = _MACHINES[os.uname().machine]
    header, data = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    _syscall((126, 91)[column], header, data)  # capset


def _landlock(scratch: str, readable: Sequence[str]) -> None:
    abi = _syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    handled = _RIGHTS_BY_ABI[min(abi, 5)]
    net = 3 if abi >= 4 else 0  # bind and connect
    scoped = 3 if abi >= 6 else 0  # abstract unix sockets and signals
    attributes = struct.pack("<QQQ", handled, net, scoped)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = _syscall(444, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    _allow_path(ruleset, scratch, _SCRATCH_RIGHTS & handled)
    for root in readable:
        if root.endswith(".zip"):
            _allow_path(ruleset, root, _READ_FILE)
            continue
        _allow_path(ruleset, root, _READ_DIR)
        for entry in os.scandir(root):  # one rule an entry, since a rule on the folder would include site-packages
            if entry.name not in _NOT_STDLIB and os.access(entry.path, os.F_OK):
                _allow_path(ruleset, entry.path, _READ_FILE)
    _syscall(446, ctypes.c_int(ruleset), ctypes.c_uint32(0))  # landlock_restrict_self
    os.close(ruleset)


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("<Qi", rights, descriptor)
        _syscall(445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))  # landlock_add_rule
    finally:
        os.close(descriptor)


def _seccomp(threads: bool) -> None:
    program = _filter(threads)
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    prog = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    column, _ = _MACHINES[os.uname().machine]
    _syscall((317, 277)[column], ctypes.c_uint(1), ctypes.c_uint(0), prog)  # seccomp(SECCOMP_SET_MODE_FILTER)


def _filter(threads: bool) -> list[tuple[int, int, int, int]]:
    """Return the allow-list as classic BPF, each instruction (code, jump if true, jump if false, operand)."""
    load, equal, mask, ret = 0x20, 0x15, 0x54, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # ALLOW, ERRNO(EPERM), KILL_PROCESS
    column, arch = _MACHINES[os.uname().machine]
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (ret, 0, 0, kill), (load, 0, 0, 0)]
    for numbers in _SYSCALLS.values():
        if numbers[column] >= 0:
            program += [(equal, 0, 1, numbers[column]), (ret, 0, 0, allow)]
    for conditional in [*_CONDITIONAL, *([_CLONE_THREADS_ONLY] if threads else [])]:
        pair, argument, bits, values = conditional
        body = [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits)]  # the low half of a little-endian argument
        for value in values:
            body += [(equal, 0, 1, value), (ret, 0, 0, allow)]
        body.append((ret, 0, 0, deny))
        program += [(equal, 0, len(body), pair[column]), *body]
    program += [(equal, 0, 1, _CLONE3), (ret, 0, 0, 0x00050000 | 38)]  # ENOSYS
    return [*program, (ret, 0, 0, deny)]
