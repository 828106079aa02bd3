import ctypes
import gzip
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT

from ptl.errors import InputError
from ptl.sandbox import lockdown, runner
from ptl.sandbox.runner import DEFAULT_LIMITS, Limits, Outcome, run_many, run_tests

DATA = Path(os.environ.get("PTL_SHARED_DATA", ROOT.parent / "shared" / "data"))

MISSING = lockdown.missing_support()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no sandbox here: {MISSING}")


def programs(file):
    """By name what is in a file, of which each part begins with ### and its name."""
    parts = Path(__file__).with_name(file).read_text().split("\n### ")[1:]
    return {name.strip(): code for name, _, code in (part.partition("\n") for part in parts)}


PROGRAMS = programs("programs.txt")
NAMES = ("attacks", "memory", "squares", "values", "fail closed")
ATTACKS, MEMORY, SQUARES, VALUES, FAIL_CLOSED = map(PROGRAMS.get, NAMES)


def all_denied(*attacks: str) -> None:
    """Each of these programs, one after the other in one sandbox, must end with an error of the system."""
    outcome = run_tests(
        ATTACKS.format(attacks=attacks),
        "assert {r for _, r in outcomes()} == {'denied'}, outcomes()",
    )
    assert outcome.passed, outcome


def all_work(*attacks: str) -> None:
    """The control: outside of the sandbox each reaches what it wants."""
    code = (
        ATTACKS.format(attacks=attacks)
        + "print({r for _, r in outcomes()} == {'reached'} or outcomes())"
    )
    control = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False
    )
    assert control.stdout.strip() == "True", (
        f"the attack itself does not work: {control.stdout} {control.stderr}"
    )


# ------------------------------------------------------------------------------------------- right and wrong answers


def test_right_wrong_and_broken_solutions_get_their_outcome():
    tests = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
    assert run_tests("def add(a, b):\n    return a + b", tests) == Outcome(True, "passed", "")
    failing = {
        "def add(a, b):\n    return a - b": ["AssertionError", "line 1: assert add(1, 2) == 3"],
        "def add(a, b):\n    return 3": ["AssertionError", "line 2: assert add(-1, 1) == 0"],
        "def add(a, b:\n    return a": ["SyntaxError"],
        "x = 1": ["NameError"],
        "def add(a, b):\n    raise KeyError('no')": ["KeyError: 'no'"],
        "def add(a, b):\n    print('called')\n    return 1\nprint('loaded')": [
            "output:\nloaded\ncalled\n"
        ],
        "#" * 1_000_001: ["1000001 characters"],
    }
    for code, texts in failing.items():
        outcome = run_tests(code, tests)
        assert (outcome.passed, outcome.status) == (False, "failed")
        assert all(text in outcome.detail for text in texts)
    with pytest.raises(InputError, match="empty"):
        run_tests("x = 1", "  \n")


def test_usual_imports_work_on_both_sides():
    assert run_tests(PROGRAMS["usual imports"], PROGRAMS["tests of usual imports"]).passed


def test_values_classes_callbacks_and_names_of_builtins_are_usable_on_both_sides():
    equal = "assert same(v) == v and (type(same(v)) is type(v) or hasattr(v, '_fields')), v"
    outcome = run_tests(
        "def same(x): return x", "\n".join(f"v = {value}\n{equal}" for value in VALUES.splitlines())
    )
    assert outcome.passed, outcome
    outcome = run_tests(
        PROGRAMS["classes, iterators, callbacks and exceptions"], PROGRAMS["their tests"]
    )
    assert outcome.passed, outcome
    assert run_tests("def sum(a, b):\n    return a * b", "assert sum(10, 15) == 150").passed
    assert not run_tests("def sum(a, b):\n    return 6", "assert sum(10, 15) == 150").passed
    both = "def trace(a):\n    return a\ndef f(a):\n    return -a"
    # trace is also a standard module
    assert run_tests(both, "assert trace(3) == 3 and f(3) == -3").passed


def test_run_many_keeps_the_order_and_repeats():
    pairs = [(f"def f(): return {i % 3}", "assert f() == 0") for i in range(4)]
    # the order of a set too
    pairs.append(("def f(): return [*{'a', 'b', 'c', 'd', 'e', 'f'}]", "assert 0, f()"))
    first = run_many(pairs)
    assert [outcome.passed for outcome in first] == [True, False, False, True, False]
    assert run_many(pairs) == first


def test_a_container_has_fewer_cores_than_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(128))
    monkeypatch.setattr(runner, "CPU_LIMIT", tmp_path / "cpu.max")
    assert runner._cores() == 128
    for limit, cores in (("max 100000", 128), ("800000 100000", 8), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
        assert runner._cores() == cores


# ------------------------------------------------------------------------- attacks on what the machine holds: denied


def test_files_and_folders_of_others_cannot_be_read_or_listed(tmp_path):
    token = tmp_path / "token"
    token.write_text("secret")
    # The candidate cannot make a link, so try what a helper outside could leave: the rules hold for the target.
    (tmp_path / "link").symlink_to(token)
    own = [f"/proc/{os.getpid()}/{name}" for name in ("status", "environ")]
    paths = [
        token,
        Path(__file__),
        pytest.__file__,
        tmp_path / "link",
        "/etc/passwd",
        "/dev/zero",
        *own,
    ]
    paths += ["/proc/self/environ", "/proc/self/maps", "/proc/self/root/etc/passwd"]
    # in the folder of the library itself
    installed = Path(os.__file__).with_name("site-packages").rglob("*.py")
    paths += [path for path in installed if path.stat().st_size][:1]
    attacks = [f"assert open({str(path)!r}, 'rb').read(1)" for path in paths]
    folders = (tmp_path, ROOT, Path.home(), "/proc", "/")
    attacks += [f"assert __import__('os').listdir({str(path)!r})" for path in folders]
    attacks += ["import os\nassert open(f'/proc/{os.getppid()}/environ', 'rb').read(1)"]
    links = [
        f"import os\nos.{kind}({str(token)!r}, 'l')\nopen('l').read()"
        for kind in ("symlink", "link")
    ]
    all_denied(*attacks, *links)
    all_work(*attacks)


def test_nothing_outside_the_scratch_folder_can_be_changed(tmp_path):
    # Each has a file of its own, v, and the name n beside it.
    actions = [
        "open(n, 'w').write('x')",
        "open(v, 'a').write('x')",
        "os.truncate(v, 0)",
        "os.mkdir(n)",
    ]
    actions += [
        "os.close(os.open(v, os.O_RDONLY | os.O_TRUNC))",
        "os.chmod(v, 0o777)",
        "os.utime(v, (1, 1))",
    ]
    actions += ["os.rename(v, n)", "os.unlink(v)", "os.link(v, n)", "os.symlink(v, n)"]
    files = [tmp_path / str(i) for i in range(len(actions))]
    for file in files:
        file.write_text("before")
        file.chmod(0o600)
    attacks = [
        f"import os\nv, n = {str(file)!r}, {str(tmp_path / 'new') + file.name!r}\n{action}"
        for file, action in zip(files, actions, strict=True)
    ]
    flags, size = (
        ["os.O_WRONLY", "os.O_RDWR", "os.O_RDONLY | os.O_TRUNC"],
        Path(os.__file__).stat().st_size,
    )
    # the library is readable
    all_denied(*attacks, *(f"import os\nos.open(os.__file__, {flag})" for flag in flags))
    assert {*tmp_path.iterdir()} == {*files} and Path(os.__file__).stat().st_size == size
    for file in files:
        assert (
            file.read_text() == "before"
            and file.stat().st_mode & 0o777 == 0o600
            and file.stat().st_mtime > 1000
        )
    all_work(*attacks)


def test_scratch_files_work_and_are_gone_afterwards():
    outcome = run_tests(PROGRAMS["scratch files"], PROGRAMS["tests of scratch files"])
    folder = outcome.detail.split("AssertionError: ")[1].split(" ")[0]
    assert "ptl-sandbox-" in folder and not Path(folder).exists()


def test_no_socket_of_any_kind(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        path = str(tmp_path / "s")
        unix.bind(path)
        unix.listen()
        kinds = [
            ("AF_INET", "SOCK_STREAM", f"s.connect({tcp.getsockname()})"),
            ("AF_INET", "SOCK_DGRAM", "s.sendto(b'x', ('127.0.0.1', 9))"),
            ("AF_UNIX", "SOCK_STREAM", f"s.connect({path!r})"),
            ("AF_UNIX", "SOCK_DGRAM", "s.bind('\\0' + 'ptl-abstract')"),
            ("AF_NETLINK", "SOCK_RAW", "pass"),
        ]
        made = "import socket\ns = socket.socket(socket.{}, socket.{})\n{}"
        attacks = [made.format(*kind) for kind in kinds]
        all_denied(*attacks)
        all_work(*attacks)


def test_the_parent_cannot_be_killed_slowed_or_limited():
    nice, files = os.getpriority(os.PRIO_PROCESS, 0), resource.getrlimit(resource.RLIMIT_NOFILE)
    actions = [
        "os.kill(p, 9)",
        "os.kill(p, 0)",
        "os.kill(-1, 9)",
        "os.killpg(0, 9)",
        "os.kill(1, 0)",
    ]
    actions += [
        "signal.pidfd_send_signal(os.pidfd_open(p), 9)",
        "os.setpriority(os.PRIO_PROCESS, p, 19)",
    ]
    actions += [
        "os.sched_setaffinity(p, {0})",
        "resource.prlimit(p, resource.RLIMIT_NOFILE, (64, 64))",
    ]
    actions += ["fcntl.fcntl(1, fcntl.F_SETOWN, p)", "fcntl.fcntl(1, 10, 9)"]
    all_denied(
        *(f"import fcntl, os, resource, signal\np = os.getppid()\n{action}" for action in actions)
    )
    assert (os.getpriority(os.PRIO_PROCESS, 0), resource.getrlimit(resource.RLIMIT_NOFILE)) == (
        nice,
        files,
    )


def test_no_memory_of_another_process_is_reached():
    secret = ctypes.create_string_buffer(b"a secret")
    command = [sys.executable, "-c", MEMORY + "\nprint(peek(os.getpid(), own()))"]
    control = subprocess.run(command, capture_output=True, text=True, check=True)
    assert control.stdout.strip() == "(8, 0)"
    tests = f"assert peek({os.getpid()}, {ctypes.addressof(secret)}) == (-1, -1)\n"
    outcome = run_tests(MEMORY, f"{tests}assert trace({os.getpid()}) == [-1, -1, -1]")
    assert outcome.passed, outcome


def test_raw_system_calls_and_exec_are_denied():
    x32 = [0x40000000 | 41] if os.uname().machine == "x86_64" else []
    column = 0 if os.uname().machine == "x86_64" else 1
    # socket, io_uring_setup, bpf, unshare, setns, mount, memfd_create, userfaultfd, keyctl, ptrace, prctl, clone3, ...
    pairs = [(41, 198), (425, 425), (321, 280), (272, 97), (308, 268), (165, 40), (319, 279), (323, 282), (250, 219),
             (101, 117), (157, 167), (435, 435), (317, 277), (444, 444), (302, 261), (438, 438), (62, 129)]  # fmt: skip
    numbers = [pair[column] for pair in pairs] + x32
    tests = f"assert raw({numbers}) == [], raw({numbers})\nassert run() == 'denied'"
    outcome = run_tests(PROGRAMS["raw system calls"], tests)
    assert outcome.passed, outcome


# -------------------------------------------------------------------------------- attacks on resources: they are ended


def test_fork_bombs_and_threads_are_denied_and_a_memory_bomb_is_stopped():
    thread = "import threading\nthreading.Thread(target=print).start()"
    all_denied("import os\nos.fork()", thread, "import subprocess\nsubprocess.run(['/bin/true'])")
    code = "def f():\n    x = bytearray(1 << 30)\n    return len(x)"
    outcome = run_tests(code, "assert f() == 1 << 30", Limits(memory_bytes=128 << 20))
    assert not outcome.passed and "MemoryError" in outcome.detail


def test_endless_loops_end_by_cpu_or_by_wall_time():
    # On a busy machine a program has its CPU time before the clock ends it: eight processes to a core, and their start.
    assert DEFAULT_LIMITS.wall_s >= 10 * DEFAULT_LIMITS.cpu_s
    started = time.monotonic()
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    pairs = [
        ("while True: pass", "assert 1"),
        (stubborn, "assert 1"),
        ("x = 1", "while True: pass"),
    ]
    endings = run_many(pairs, Limits(cpu_s=1))
    cpu, ignored, by_tests = [(outcome.passed, outcome.status) for outcome in endings]
    assert cpu == (False, "timeout") and "1 s of CPU" in endings[0].detail
    assert ignored == by_tests == (False, "killed")
    wall = run_tests("import time\ndef f(): time.sleep(100)", "f()", Limits(wall_s=0.6))
    assert (wall.passed, wall.status) == (False, "timeout") and "0.6 s" in wall.detail
    assert time.monotonic() - started < 50  # far from the 100 s, and the limit of 60


def test_endless_output_is_cut_and_the_detail_is_bounded():
    outcome = run_tests("while True: print('x' * 1000)", "assert 1", Limits(output_bytes=10_000))
    assert (outcome.passed, outcome.status) == (False, "output_limit")
    assert len(outcome.detail) <= 2000
    long = run_tests("def f(): raise ValueError('y' * 10**6)", "f()")
    assert (long.passed, long.status) == (False, "failed") and len(long.detail) <= 2000


def test_files_beyond_the_limit_are_refused():
    one = run_tests("def f():\n    with open('a', 'wb') as g: g.write(bytes(2 << 20))", "f()")
    assert not one.passed and "OSError" in one.detail
    waits = "import time\ndef f(number, size):\n    for i in range(number): open(str(i), 'wb').write(bytes(size))\n"
    waits += "    time.sleep(0.4)"
    for number, size, status in (
        (64, 0, "passed"),
        (65, 0, "file_limit"),
        (2, 600_000, "file_limit"),
    ):
        outcome = run_tests(waits, f"f({number}, {size})")
        assert outcome.status == status, outcome


def test_a_crash_is_named_and_nothing_stays_behind():
    def held():  # earlier tests of the same process may have left children of their own
        children = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
        return sorted(path.name for path in Path("/proc/self/fd").iterdir()), sorted(
            " ".join(children).split()
        )

    before = held()
    crash = run_tests("import ctypes\ndef f(): ctypes.string_at(1)", "f()")
    assert (crash.passed, crash.status) == (
        False,
        "killed",
    ) and f"signal {signal.SIGSEGV.value}" in crash.detail
    run_tests("while True: pass", "assert 1", Limits(wall_s=0.5))
    # A death of the candidate that the tests swallow is no success.
    dead = run_tests(
        "import os\ndef f(): os._exit(0)", "try:\n    f()\nexcept BaseException:\n    pass"
    )
    assert (dead.passed, dead.status) == (False, "failed") and "exit code 0" in dead.detail
    assert held() == before


# ------------------------------------------------------------------------------------ forged success: never believed

FORGERIES = programs("forgeries.txt")


def test_forged_success_does_not_pass():
    assert run_tests("def f(x): return x * x", SQUARES).passed  # the tests can be passed
    outcomes = run_many([(code, SQUARES) for code in FORGERIES.values()], Limits(wall_s=20))
    fooled = {
        name: outcome for name, outcome in zip(FORGERIES, outcomes, strict=True) if outcome.passed
    }
    assert fooled == {} and {outcome.status for outcome in outcomes} <= {
        "failed",
        "killed",
        "timeout",
    }


KINDS = [
    *("assert f(2) == 4", "assert 4 == f(2)", "assert f(2) in [4]", "assert [f(2)] == [4]"),
    *(
        "assert {'a': f(2)} == {'a': 4}",
        "import unittest\nunittest.TestCase().assertEqual(f(2), 4)",
    ),
    "for got in map(f, [2]):\n    assert got == 4\nassert got",
    "try:\n    f(2)\nexcept:\n    pass\nassert f(2) == 4",
]


def test_forged_success_does_not_pass_other_kinds_of_assert():
    pairs = [
        (FORGERIES[name], kind) for name in ("always equal", "always equal int") for kind in KINDS
    ]
    pairs += [
        (FORGERIES[name], KINDS[7])
        for name in ("StopIteration", "exit in the call", "sys.exit in the call")
    ]
    pairs += [(FORGERIES["StopIteration"], KINDS[6])]
    shadows = [
        FORGERIES[name]
        for name in ("shadowed builtin and module", "function that poses as a module")
    ]
    # a module of the candidate is the real one
    pairs += [(code, "assert math.isclose(f(4), 16)") for code in shadows]
    fooled = [pair for pair, outcome in zip(pairs, run_many(pairs), strict=True) if outcome.passed]
    assert fooled == []
    honest = "import math\ndef f(x): return x * x"
    right = run_many([(honest, kind) for kind in (*KINDS, "assert math.isclose(f(4), 16)")])
    assert all(outcome.passed for outcome in right), right


def test_the_candidate_sees_neither_the_tests_nor_their_text_nor_what_they_print():
    actions = ["os.read(1, 9)", "os.pread(1, 9, 0)", "open('../output')", "os.listdir('..')"]
    actions += ["os.open('/proc/self/fd/1', os.O_RDONLY)"]
    code = (
        ATTACKS.format(attacks=[f"import os\n{action}" for action in actions])
        + PROGRAMS["look around"]
    )
    outcome = run_tests(code, PROGRAMS["tests of look around"])
    assert outcome.passed, outcome


# -------------------------------------------------------------------------------------------------- it fails closed


# landlock_create_ruleset, landlock_restrict_self, seccomp, capset: of x86 and of ARM
@pytest.mark.parametrize("numbers", [(444, 444), (446, 446), (317, 277), (126, 91)])
def test_nothing_runs_where_the_kernel_refuses(numbers):
    code = FAIL_CLOSED.format(number=numbers[0 if os.uname().machine == "x86_64" else 1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.startswith("WorkError:") and "the candidate ran" not in done.stdout
    assert ("lacks Landlock" if numbers[0] == 444 else "could not be set up") in done.stdout


# -------------------------------------------------------------------------------------------- the reference solutions


@pytest.mark.nightly
@pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no benchmark data at {DATA}: set PTL_SHARED_DATA to the folder"
)
@pytest.mark.parametrize(("name", "number"), [("HumanEval.jsonl.gz", 164), ("mbpp.jsonl", 974)])
def test_every_reference_solution_passes_and_no_empty_one(name, number):
    data = (DATA / name).read_bytes()
    rows = [
        json.loads(line)
        for line in (gzip.decompress(data) if name.endswith("gz") else data).splitlines()
    ]
    if name == "mbpp.jsonl":
        pairs = [
            (row["code"], "\n".join([row["test_setup_code"], *row["test_list"]])) for row in rows
        ]
    else:
        tests = [f"{row['test']}\ncheck({row['entry_point']})\n" for row in rows]
        pairs = [
            (row["prompt"] + row["canonical_solution"], test)
            for row, test in zip(rows, tests, strict=True)
        ]
        stubs = [
            (row["prompt"] + "    return None\n", test)
            for row, test in zip(rows, tests, strict=True)
        ]
        assert not any(outcome.passed for outcome in run_many(stubs))
    outcomes = run_many(pairs, Limits(wall_s=60, cpu_s=30))
    assert len(outcomes) == number
    assert [
        row["task_id"] for row, outcome in zip(rows, outcomes, strict=True) if not outcome.passed
    ] == []
