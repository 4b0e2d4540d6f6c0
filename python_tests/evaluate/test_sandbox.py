"""The sandbox: good programs pass, bad ones cost their own score and nothing else, by each layer alone."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from klflow_ext.evaluate import guard, sandbox
from klflow_ext.evaluate.sandbox import run_program

try:
    PERMITTED = sandbox.permitted_layers()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)
SOME = int(os.environ.get("KLFLOW_HUMANEVAL", 20))  # of the 164 tasks


@pytest.fixture(params=["namespaces", "seccomp", "all"])
def layers(request):
    if request.param == "all":
        return PERMITTED
    if request.param not in PERMITTED:
        pytest.skip(f"this machine does not permit {request.param}")
    return (request.param,)


def commands(mark):
    """The processes of this machine, in whatever namespace, that have named themselves so."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text() == f"{mark}\n":
                found.append(folder.name)
        except OSError:
            pass
    return found


def test_a_good_program_passes(layers):
    found = run_program(
        "import math, dataclasses\nprint('h\\u00e9', math.pi)\nassert __name__ == '__main__'", layers=layers
    )
    assert found.passed and found.reason == "passed" and found.output.startswith("h\u00e9 3.14") and found.seconds < 10
    assert found.network == ("namespace" if "namespaces" in layers else "seccomp")
    assert found.processes == ("seccomp" if "seccomp" in layers else "counted")


@pytest.mark.parametrize(
    "source, reason",
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import numpy", "ModuleNotFoundError"),
        ("input()", "EOFError"),
        ("import os; os.abort()", "signal SIGABRT"),
        ("\ud800", "UnicodeEncodeError"),
        ("\0", "SyntaxError"),
    ],
)
def test_a_program_that_fails_says_why(source, reason):
    found = run_program(source)
    assert (found.passed, found.reason) in [(False, reason), (False, "ValueError" if source == "\0" else reason)]


def test_it_knows_nothing_of_the_one_that_started_it(layers, monkeypatch):
    monkeypatch.setenv("SECRET", "7")
    found = run_program(
        "import os, sys\nprint(sorted(os.environ), os.listdir('.'), sys.argv, [n for n in sys.path if 'site-packages' in n])",
        layers=layers,
    )
    assert found.output == "['HOME', 'LANG', 'PATH', 'TMPDIR'] [] ['program'] []\n"


def test_endless_loop(layers):
    found = run_program("while True: pass", timeout=1.0, layers=layers)
    assert (found.passed, found.reason) == (False, "timeout") and found.seconds < 3


def test_a_timeout_amid_the_start_leaves_nothing(layers):
    for i in range(1, 30):
        run_program("import time\ntime.sleep(20)", timeout=i * 0.004, layers=layers)
    assert seen(lambda: not any(map(mark_of, Path("/proc").glob("[0-9]*"))), 30)  # but those of other tests meanwhile


def mark_of(folder):
    try:
        command = (folder / "cmdline").read_bytes()
    except OSError:
        return False
    return b"klflow_ext/evaluate/guard.py" in command or b"leave(code)\nmain()" in command


def test_time_of_the_clock_not_only_of_the_processor(layers):
    found = run_program("import time\ntime.sleep(100)", timeout=0.5, layers=layers)
    assert found.reason == "timeout" and found.seconds < 3


def test_fork_bomb(layers):
    found = run_program("import os\nwhile True: os.fork()", timeout=3.0, layers=layers)
    assert not found.passed and found.seconds < 8
    assert found.reason == ("PermissionError" if "seccomp" in layers else "processes")
    assert run_program("pass", layers=layers).passed


def test_memory_hog(layers):
    found = run_program("x = []\nwhile True: x.append(bytearray(2**24))", layers=layers)
    assert (found.passed, found.reason) == (False, "MemoryError")
    assert run_program("bytearray(2**28)", layers=layers).passed


@pytest.mark.skipif("seccomp" not in PERMITTED, reason="this machine does not permit seccomp")
@pytest.mark.parametrize(
    "call",
    [
        "os.memfd_create('x')",
        "failed(libc.unshare(0x10000000))",
        "failed(libc.shmget(0, 4096, 0o1600))",
        "failed(libc.setns(3, 0))",
    ],
)
def test_no_way_around_the_limits(call, layers):
    source = f"import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n{FAILED}{call}"
    if "seccomp" in layers:
        assert run_program(source, layers=layers).reason == "PermissionError"


FAILED = """
def failed(result):
    if result < 0: raise OSError(ctypes.get_errno(), "")
"""


def test_folders_in_folders_are_removed(layers, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = "import os\nfor i in range(3000):\n    os.mkdir('d')\n    os.chdir('d')"
    run_program(source, layers=layers)
    assert list(tmp_path.iterdir()) == []


def test_root_behind_no_wall_is_refused():
    with pytest.raises(OSError, match="could write anywhere"):
        guard.check_walls(["seccomp"], False, 0)
    guard.check_walls(["seccomp"], True, 0), guard.check_walls(["seccomp"], False, 1000)
    guard.check_walls(["namespaces"], False, 0)


def test_file_writer(layers, tmp_path):
    (tmp_path / "there").write_text("mine")
    for path in (tmp_path / "new", tmp_path / "there", "/tmp/klflow-new", "/dev/shm/new"):
        if "namespaces" in layers or landlock_is_there():
            found = run_program(f"open({str(path)!r}, 'w')", layers=layers)
            assert (found.passed, found.reason) in [(False, "OSError"), (False, "PermissionError")], path
    assert [p.name for p in tmp_path.iterdir()] == ["there"] and (tmp_path / "there").read_text() == "mine"
    assert run_program(
        "open('mine', 'w').write('x' * 2**20)\nassert open('mine').read() == 'x' * 2**20", layers=layers
    ).passed
    found = run_program("file = open('a', 'wb')\nwhile True: file.write(bytes(2**24))", layers=layers)
    assert not found.passed and found.reason in ("OSError", "signal SIGXFSZ")


def landlock_is_there():
    import ctypes

    return ctypes.CDLL(None).syscall(444, None, 0, 1) > 0


@pytest.mark.skipif("namespaces" not in PERMITTED, reason="this machine does not permit namespaces")
def test_many_files_fill_no_disk():
    source = "i = 0\nwhile True:\n    open(str(i), 'wb').write(bytes(2**22))\n    i += 1"
    found = run_program(source)
    assert (found.passed, found.reason) == (False, "OSError") and "No space left" in found.output


def test_its_folder_is_removed(layers):
    found = run_program("import os\nopen('x', 'w')\nprint(os.getcwd())", layers=layers)
    assert found.passed and not Path(found.output.strip()).exists()


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit()",
        "import os\nos.write(4, b'passed')\nos._exit(0)",
        "import os\nfor i in range(3, 64):\n    try: os.write(i, b'0' * 32)\n    except OSError: pass",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_ending_before_the_tests_is_no_pass(source, layers):
    assert not run_program(f"{source}\nassert False", layers=layers).passed


def test_deep_recursion(layers):
    assert run_program("f = lambda: f()\nf()", layers=layers).reason == "RecursionError"
    found = run_program("import sys\nsys.setrecursionlimit(10**9)\nf = lambda *x: f(*x)\nf()\n", layers=layers)
    assert not found.passed and found.reason in ("MemoryError", "signal SIGSEGV")
    found = run_program("x = None\nfor i in range(10**6): x = [x]\nprint(repr(x))", layers=layers)
    assert not found.passed


def test_output_flood(layers):
    for stream in ("stdout", "stderr"):
        found = run_program(f"import sys\nwhile True: sys.{stream}.write('flood' * 1000)", layers=layers)
        assert (found.passed, found.reason) == (False, "output") and len(found.output) == sandbox.MOST_OUTPUT
    assert run_program("print('x' * 60000)", layers=layers).passed


LEAVE = """
import ctypes, os, time
ctypes.CDLL(None).prctl(15, b'NAME')
if not os.fork():
    os.setsid()
    if not os.fork():
        os.closerange(0, 64)
        time.sleep(60)
    os._exit(0)
ENDING
"""


@pytest.mark.parametrize("ending", ["pass", "os._exit(0)", "time.sleep(60)"])
def test_a_process_that_leaves_its_group(ending, layers):
    name = f"left{os.getpid()}"
    found = run_program(LEAVE.replace("NAME", name).replace("ENDING", ending), timeout=2.0, layers=layers)
    assert found.passed == (ending == "pass" and layers == ("namespaces",)) and found.seconds < 5
    assert found.reason == "PermissionError" or "seccomp" not in layers
    assert commands(name) == []


def test_one_that_has_left_is_seen_here_while_it_runs(layers):
    """Else the test above would find nothing whatever is left."""
    name = f"here{os.getpid()}"
    source = LEAVE.replace("NAME", name).replace("ENDING", "time.sleep(60)").replace("os.fork()", "FORK")
    source = source.replace("FORK", "os.fork()" if layers == ("namespaces",) else "1")
    thread = threading.Thread(target=run_program, args=(source,), kwargs={"timeout": 3.0, "layers": layers})
    thread.start()
    most = 0
    while thread.is_alive():
        most = max(most, len(commands(name)))
        time.sleep(0.01)
    assert most >= (2 if layers == ("namespaces",) else 1) and commands(name) == []


def test_it_ends_with_the_one_that_started_it(layers, tmp_path):
    name = f"mine{os.getpid()}"
    program = f"import ctypes, time\nctypes.CDLL(None).prctl(15, b{name!r})\ntime.sleep(60)"
    code = (
        f"from klflow_ext.evaluate.sandbox import run_program\nrun_program({program!r}, timeout=60, layers={layers!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}) as starter:
        try:
            assert seen(lambda: commands(name), 60)
        finally:
            starter.kill()
    assert seen(lambda: not commands(name), 10)


def seen(what, seconds):
    end = time.time() + seconds
    while not what() and time.time() < end:
        time.sleep(0.02)
    return what()


def test_it_signals_nobody(layers):
    source = f"""
import os
for pid in (os.getppid(), {os.getpid()}, -1):
    try:
        os.kill(pid, 15)
    except OSError:
        pass
"""
    start = time.time()
    run_program(source, timeout=2.0, layers=layers)
    assert time.time() - start < 8  # and this process is there to say so
    if "seccomp" in layers:
        assert run_program(source, layers=layers).passed


def test_network(layers):
    source = "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=2)"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        found = run_program(source.replace("PORT", str(server.getsockname()[1])), layers=layers)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert not found.passed and found.reason in ("OSError", "PermissionError", "ConnectionRefusedError")


def test_one_that_cannot_be_set_up_is_no_score():
    with pytest.raises(ValueError, match="layers: got"):
        run_program("pass", layers=("walls",))
    with pytest.raises(ValueError, match="timeout: got 0"):
        run_program("pass", timeout=0)
    with pytest.raises(ValueError, match="memory: got 1"):
        run_program("pass", memory=1)


def test_canonical_solutions_pass(data_folder):
    """20 of HumanEval's 164; all with KLFLOW_HUMANEVAL=164."""
    with gzip.open(data_folder / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        tasks = [json.loads(line) for line in file]
    for task in tasks[:: max(1, len(tasks) // SOME)]:
        source = f"{task['prompt']}{task['canonical_solution']}{task['test']}\ncheck({task['entry_point']})\n"
        found = run_program(source, timeout=30)
        assert found.passed, (task["task_id"], found)
        assert not run_program(source + "assert False").passed
