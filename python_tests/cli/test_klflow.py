"""What the command says without torch, its exit codes, and that its table is whole."""

import os
import subprocess
import sys
import time
from importlib import import_module

import pytest

import klflow as command
from klflow_ext import __version__

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; sys.argv[1:] = {}; import klflow; klflow.main()"


def said(*words):
    """Without torch."""
    script = WITHOUT_TORCH.format(list(words))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_answers_without_torch():
    done = said("--version")
    assert (done.returncode, done.stdout) == (0, f"klflow {__version__}\n")
    for words in (["--help"], ["-h"]):
        done = said(*words)
        assert done.returncode == 0 and "Exit codes: 0 done, 1 wrong input" in done.stdout
        for name, (_, line) in command.COMMANDS.items():
            assert f"\n  {name:<10}{line}\n" in done.stdout
    done = said()
    assert done.returncode == 2 and not done.stdout and "usage: klflow" in done.stderr
    done = said("fly")
    assert done.returncode == 2 and done.stderr.startswith("klflow: got 'fly', allowed is one of info, demo, ")


def test_answers_at_once():
    """Half a second is what it may take; the best of three, as another process may be at work."""
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, command.__file__, "--help"], check=True, capture_output=True)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5


@pytest.mark.parametrize("name", command.COMMANDS)
def test_the_table_is_whole(klflow, name):
    module, kind = command.COMMANDS[name][0].split(":")
    assert callable(getattr(import_module(f"klflow_ext.cli.{module}"), kind).run)
    done = klflow(name, "--help")
    assert done.returncode == 0 and f"usage: klflow {name}" in done.stdout


@pytest.mark.slow
def test_exit_codes():
    def code(*words, **options):
        return subprocess.run(
            [sys.executable, "-m", "klflow", *words], stderr=subprocess.PIPE, text=True, **options
        )  # fmt: skip

    done = code("sample", "nowhere")
    assert done.returncode == 1 and done.stderr.startswith("klflow: ") and done.stderr.count("\n") == 1
    assert code("sample", "--fly", stdout=subprocess.DEVNULL).returncode == 2
    reader, writer = os.pipe()
    os.close(reader)
    done = code("info", stdout=writer)
    assert done.returncode == 128 + 13 and not done.stderr


def test_memory_is_input(klflow, monkeypatch):
    def fail(self):
        raise RuntimeError(message)

    monkeypatch.setattr("klflow_ext.cli.info.Info.run", fail)
    message = "DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\nmore"
    done = klflow("info")
    assert done.returncode == 1 and "klflow: not enough memory: DefaultCPUAllocator" in done.stderr
    message = "a mistake"
    with pytest.raises(RuntimeError, match="a mistake"):
        klflow("info")
