"""Signals end training after the step, which is saved; a second one ends it at once."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from runs import saved, trainer

from klflow_ext.train import Stopped
from klflow_ext.train.signals import NAMES, Signals


@pytest.fixture(params=NAMES)
def number(request):
    """A signal, as a program has it that was started by hand, whatever the tests were started from."""
    number = getattr(signal, request.param)
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)
    yield number
    assert signal.getsignal(number) is default
    signal.signal(number, before)


def signalled(run, at, number):
    """The run, which sends itself a signal in the step after `at`."""
    plain = run.train_step

    def step():
        if run.step == at:
            os.kill(os.getpid(), number)
        return plain()

    run.train_step = step
    return run


def test_a_signal_ends_after_the_step_and_saves(tmp_path, number):
    expected = KeyboardInterrupt if number == signal.SIGINT else Stopped
    with pytest.raises(expected, match=r"step 8 is saved [\d.]+ s after the signal: klflow train --resume") as stop:
        signalled(trainer(1000, tmp_path), 7, number).fit(progress=False)
    if expected is Stopped:
        assert stop.value.code == 128 + number and stop.value.signal == number
    whole, resumed = trainer(1000), trainer(1000, tmp_path)
    resumed.load()
    assert resumed.step == 8
    for _ in range(8):
        whole.train_step()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_signal_while_the_end_is_saved(tmp_path, number):
    run = trainer(2, tmp_path)
    plain = run.save
    run.save = lambda: (os.kill(os.getpid(), number), plain())
    with pytest.raises((KeyboardInterrupt, Stopped), match="step 2 is saved"):
        run.fit(progress=False)
    assert saved(tmp_path)["step"] == 2


def test_without_a_folder_nothing_is_kept(number):
    with pytest.raises((KeyboardInterrupt, Stopped), match="nothing of its 3 steps is kept"):
        signalled(trainer(9), 2, number).fit(progress=False)


def test_what_is_ignored_or_handled_stays_so(number):
    default, got = signal.getsignal(number), []
    for handler in (signal.SIG_IGN, lambda *_: got.append(1)):
        signal.signal(number, handler)
        run = signalled(trainer(2), 1, number)
        run.fit(progress=False)
        assert run.step == 2 and signal.getsignal(number) is handler
    assert got == [1]
    signal.signal(number, default)


def test_only_the_main_thread_listens():
    done = []
    thread = threading.Thread(target=lambda: (trainer(2).fit(progress=False), done.append(1)))
    thread.start()
    thread.join()
    assert done


def test_the_second_one_does_what_it_did_before():
    got, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            got.append(signals.number)
            os.kill(os.getpid(), signal.SIGINT)
            got.append("not reached")
    finally:
        signal.signal(signal.SIGINT, before)
    assert got == [signal.SIGINT]


PROGRAM = """
import sys, time
from runs import trainer
run = trainer(10**6, sys.argv[1])
plain = run.train_step
def step():  # that lasts
    print("step", flush=True)
    loss = plain()
    time.sleep(float(sys.argv[2]))
    return loss
run.train_step = step
run.fit(progress=False)
"""


def program(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, preexec_fn=lambda: [signal.signal(getattr(signal, name), signal.SIG_DFL) for name in NAMES],
    )  # fmt: skip


@pytest.mark.slow
def test_as_a_program(tmp_path):
    """Nobody catching what is raised: the exit status; a second signal; a terminal that closes, and its shell."""
    for gap, first, second, status in (
        (0, signal.SIGTERM, None, 128 + signal.SIGTERM),
        (0, signal.SIGUSR1, None, 128 + signal.SIGUSR1),
        (1, signal.SIGHUP, signal.SIGHUP, 128 + signal.SIGHUP),
        (60, signal.SIGTERM, signal.SIGTERM, -signal.SIGTERM),
        (60, signal.SIGTERM, signal.SIGUSR1, -signal.SIGUSR1),
    ):
        folder = tmp_path / f"{gap}-{first}-{second}"
        process = program(folder, gap)
        assert process.stdout.readline() == "step\n", process.stderr.read()
        time.sleep(0.1)
        process.send_signal(first)
        if second is not None:
            time.sleep(0.2)  # else both arrive as one
            process.send_signal(second)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == status, said
        assert bool(list(folder.glob("checkpoint-*"))) == (status > 0)
        assert not re.search("Traceback", said), said


@pytest.mark.slow
def test_processes_stop_together(tmp_path):
    """A signal to one of two ends both after the same step, which is saved before either ends."""
    code = """
import sys
from pathlib import Path
from runs import trainer
run = trainer(10**6, Path(sys.argv[1]))
plain = run.train_step
def step():
    if run.step == 3:
        print("step", flush=True)
    return plain()
run.train_step = step
try:
    run.fit(progress=False)
finally:
    print("ended", run.step, flush=True)
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for target in range(2):
        workers = []
        for rank in range(2):
            settings = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            settings["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, str(tmp_path / str(target))], env={**os.environ, **settings},
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        assert [worker.stdout.readline() for worker in workers] == ["step\n"] * 2
        workers[target].send_signal(signal.SIGTERM)
        said = [worker.communicate(timeout=120) for worker in workers]
        assert [worker.returncode for worker in workers] == [143, 143], said
        assert said[0][0] == said[1][0] == f"ended {saved(tmp_path / str(target))['step']}\n"
