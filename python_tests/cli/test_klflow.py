"""What the command says without torch, its exit codes, and that its table is whole."""

import os
import re
import subprocess
import sys
import time

import pytest

import klflow as command
from klflow_ext import __version__
from klflow_ext.cli.command import Command, command_of
from klflow_ext.cli.help import helps

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
            assert f"\n  {name:<12}{line}\n" in done.stdout
    done = said("train", "--help")
    assert (
        done.returncode == 0 and done.stdout.startswith("usage: klflow train") and "--optimizer {muon," in done.stdout
    )
    done = said()
    assert done.returncode == 2 and not done.stdout and "usage: klflow" in done.stderr
    done = said("fly")
    assert done.returncode == 2 and done.stderr.startswith("klflow: got 'fly', allowed is one of info, demo, ")


def test_answers_at_once():
    """Half a second is what it may take; the best of three, as another process may be at work."""
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, command.__file__, "train", "--help"], check=True, capture_output=True)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5


def test_every_command_has_its_help_as_it_is_now():
    """Word for word, whatever tyro draws around it; all of them take --quiet and --verbose."""
    told = helps()
    assert list(told) == list(command.COMMANDS)
    for name, text in told.items():
        assert issubclass(command_of(name), Command) and command_of(name).run is not Command.run
        assert f"usage: klflow {name} [-h]" in text and "-q, --quiet" in text and "-v, --verbose" in text
        said = [
            re.split(r"\s{2,}", each.strip(), maxsplit=1)[-1] for each in re.split(r"\n  (?=[-\[]|[A-Z]+ )", text)[1:]
        ]
        assert said and not [each for each in said if each.startswith("(default")], (
            f"klflow {name}: an option without a word"
        )
        assert not re.search(r"\n {10,}[^\n]{1,40}(?<![.,;:)\]])\n {10,}[a-z]{1,12}\b", text), (
            f"klflow {name}: a broken line"
        )
        words = re.findall(r"[\w-]{2,}", command.help_of(name) or "")
        assert [w for w in words if set(w) != {"-"}] == [
            w for w in re.findall(r"[\w-]{2,}", text) if set(w) != {"-"}
        ], f"the help of klflow {name} is not what it was: python -m klflow_ext.cli.help writes it anew"


def test_a_narrow_terminal_has_its_help_made_for_it(klflow, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert command.answer(["plot", "--help"]) is None
    done = klflow("plot", "--help")
    assert done.returncode == 0 and "usage: klflow plot" in done.stdout
    assert max(map(len, done.stdout.split("positional")[1].splitlines())) <= 60


def test_bash_completes(klflow, tmp_path):
    done = klflow("completion", "bash")
    assert done.returncode == 0, done.stderr
    (tmp_path / "klflow.bash").write_text(done.stdout)
    script = """source klflow.bash; how=$(complete -p klflow); how=${how#*-F }; how=${how%% *}
        for words in "klflow com" "klflow train --optimizer " "klflow sample --jso"; do
            IFS=' ' read -ra COMP_WORDS <<< "$words"; [[ $words = *" " ]] && COMP_WORDS+=("")
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); $how; echo ${COMPREPLY[@]}
        done"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert [sorted(line.split()) for line in done.stdout.splitlines()] == [
        ["complete", "completion"], ["adamw", "muon"], ["--jsonl"],
    ], done.stderr  # fmt: skip
    assert klflow("completion", "zsh").stdout.startswith("#compdef klflow")


def test_quiet_and_verbose(klflow, stories):
    usual = klflow("sample", "--count", "1", "--steps", "2", "--length", "6")
    assert usual.returncode == 0 and usual.stderr.startswith("2 passes, ") and usual.stderr.count("\n") == 1
    quiet = klflow("sample", "--count", "1", "--steps", "2", "--length", "6", "-q")
    assert quiet.stdout == usual.stdout and not quiet.stderr
    verbose = klflow("sample", "--count", "1", "--steps", "2", "--length", "6", "--verbose")
    assert verbose.stdout == usual.stdout and "M parameters on cpu; LogitPath(" in verbose.stderr
    assert "method: segments; Options(" in verbose.stderr
    wrong = klflow("sample", "nowhere")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    wrong = klflow("sample", "nowhere", "-v")
    assert wrong.returncode == 1 and "Traceback" in wrong.stderr and wrong.stderr.endswith("it has no checkpoint")
    wrong = klflow("sample", "-q", "-v")
    assert wrong.returncode == 1 and "quiet: got it beside verbose, allowed is one of the two" in wrong.stderr


def test_nothing_reaches_the_terminal_but_text(klflow, stories, monkeypatch):
    """Neither from a model, whose every token here is an escape, nor from what a user typed."""
    monkeypatch.setattr(
        "klflow_ext.sample.Samples.texts", property(lambda self: ["\x1b[2Jred\x9b1m\u202e\n"] * len(self.tokens))
    )
    for words in (["sample"], ["complete", "--prompt", "Once"], ["infill", "--text", "a {?2} b"]):
        done = klflow(*words, "--steps", "2")
        assert done.returncode == 0 and "\\x1b[2Jred\\x9b1m\\u202e" in done.stdout, done.stderr
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.stdout + done.stderr)
    done = klflow("sample", "\x1b[2J")
    assert (
        done.returncode == 1 and "klflow: run: \\x1b[2J is no run folder" in done.stderr and "\x1b" not in done.stderr
    )


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


@pytest.mark.parametrize(
    "chosen, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_leave_processors_to_others(monkeypatch, chosen, expected):
    from klflow_ext import cli

    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "run", lambda words: os.environ.get("GOMP_SPINCOUNT") or "none")
    monkeypatch.setattr(sys, "argv", ["klflow", "info"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == (expected or "none")
