"""benchmarks/gpu.sh with a Python that only pretends: what it does when something fails, hangs or is stopped. And the smoke's
limits, which the CUDA kernels must keep as host code too."""

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from klflow_ext import _C

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import smoke  # noqa: E402

PYTHON = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
  *"pip list"*) ;;
  *"pip install"*klflow_ext-*.whl) while [ "$1" != --target ]; do shift; done; mkdir "$2/klflow_ext" ;;
  *"${FAILS:-nothing}"*) echo "it went wrong"; exit 3 ;;
  *"${HANGS:-nothing}"*) while [ "$1" != --json ]; do shift; done; echo figure >"$2"; echo "pid $$" >>"$CALLS"; exec sleep 60 ;;
esac
"""


@pytest.fixture
def gpu(tmp_path):
    """gpu(*arguments, **environment): starts the script. .finish(): (exit code, summary); .calls(): what Python was asked for."""
    python, folder, calls = tmp_path / "python", tmp_path / "out", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)

    class Run:
        def __init__(self, *arguments, **environment):
            calls.write_text("")
            env = {**os.environ, "PYTHON": str(python), "CALLS": str(calls), "KLFLOW_WHEELS": str(tmp_path / "none")}
            command = [str(ROOT / "benchmarks" / "gpu.sh"), str(folder), *arguments]
            self.process = subprocess.Popen(command, env={**env, **environment}, stdout=subprocess.PIPE, text=True)

        def finish(self):
            self.printed = self.process.communicate(timeout=60)[0]
            return self.process.returncode, self.file("summary.txt")

        def file(self, name):
            (path,) = folder.glob("gpu-*.tar.gz")
            with tarfile.open(path) as archive:
                names = archive.getnames()
                return archive.extractfile(f"./{name}").read().decode() if f"./{name}" in names else None

        def calls(self):
            return calls.read_text().splitlines()

        def wait_for(self, text):
            for _ in range(200):
                if any(text in call for call in self.calls()):
                    return
                time.sleep(0.1)
            raise AssertionError(f"no call with {text}")

    Run.folder = folder
    return Run


@pytest.mark.slow
def test_all_parts_and_one_archive(gpu):
    run = gpu()
    code, summary = run.finish()
    assert code == 0 and run.printed == summary and [p.name for p in gpu.folder.iterdir()] == ["gpu-smoke.tar.gz"]
    steps = [line.split()[1] for line in summary.splitlines() if line.startswith("ok")]
    order = [
        "build",
        "library",
        "info",
        "smoke",
        "tests",
        "kernels",
        "peers",
        "linear",
        "embedding",
        "train_step",
        "fit",
    ]
    assert [step for step in steps if step in order] == order
    assert all(run.file(f"{step}.log") is not None for step in steps)
    asked = "\n".join(run.calls())
    assert "--device cuda" in asked and "--device cpu" not in asked and "-k cuda" in asked


@pytest.mark.parametrize(
    "fails,last,message",
    [
        ("pip install", "pip install", "nothing is measured without the library"),
        ("build_info()", "build_info()", "nothing is measured without the library"),
        ("is_available()", "is_available()", "sees no CUDA device"),
    ],
)
def test_what_ends_a_call(gpu, fails, last, message):
    run = gpu(FAILS=fails)
    code, summary = run.finish()
    assert code == 1 and message in summary and last in run.calls()[-1]


def test_a_step_that_fails_does_not_end_the_others(gpu):
    run = gpu("kernels", "peers", FAILS="--no-peers")
    code, summary = run.finish()
    assert code == 1 and "FAILED  kernels" in summary and "it went wrong" in summary and "ok      peers" in summary
    assert [p.name for p in gpu.folder.iterdir()] == ["gpu-kernels.tar.gz"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_call_that_is_stopped_brings_back_what_it_has(gpu, how):
    run = gpu("kernels", HANGS="--no-peers")
    run.wait_for("pid ")
    if how == signal.SIGKILL:
        time.sleep(7)  # it packs every five seconds
    run.process.send_signal(how)
    code = run.process.wait(timeout=30)
    assert code == (143 if how == signal.SIGTERM else -signal.SIGKILL)
    assert run.file("cuda.json") == "figure\n"
    assert ("stopped" in run.file("summary.txt")) == (how == signal.SIGTERM)
    if how == signal.SIGKILL:  # the step goes on until its own limit, unless it is ended
        os.kill(int(run.calls()[-1].removeprefix("pid ")), signal.SIGTERM)


@pytest.mark.slow
def test_the_limit_of_a_call(gpu):
    run = gpu("kernels", "peers", HANGS="--no-peers", KLFLOW_LIMIT="3")
    code, summary = run.finish()
    assert code == 1 and "STOPPED kernels  after" in summary and "skipped peers: no time left" in summary
    assert run.file("cuda.json") == "figure\n"


def test_a_library_that_was_packed_saves_the_build(gpu, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "klflow_ext-0.whl").write_text("")
    for sources, build in (("of another tree\n", True), (None, False)):
        if sources is None:  # what --pack would have written
            script = (ROOT / "benchmarks" / "gpu.sh").read_text()
            function = next(line for line in script.splitlines() if line.startswith("sources()"))
            done = subprocess.run(["bash", "-c", f"{function}; sources"], cwd=ROOT, capture_output=True, text=True)
            sources = done.stdout
        (wheels / "sources").write_text(sources)
        code, summary = gpu("smoke", KLFLOW_WHEELS=str(wheels)).finish()
        assert code == 0 and ("ok      build" in summary) == build and ("packed one" in summary) != build


def test_a_part_that_is_none(gpu):
    run = gpu("kernel")
    assert (
        run.process.wait(timeout=10) == 2 and "part: got kernel, allowed is one of smoke" in run.process.stdout.read()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,vocab", [(3, 31), (9, 2503)])
def test_the_smoke_passes_kernels_that_are_right(simt_library, rows, vocab, dtype):
    calls = smoke.results(rows, vocab, dtype, "cpu")
    expected = {name: call() for name, call in calls.items()}
    _C.use_backend(str(simt_library))
    try:
        found = {name: call() for name, call in calls.items()}
    finally:
        _C.use_backend(None)
    errors = {n: max(smoke.error(a, b) for a, b in zip(found[n], expected[n], strict=True)) for n in calls}
    assert all(value <= smoke.LIMIT[dtype] for value in errors.values()), errors
    assert any(value > 0 for value in errors.values())


def test_the_smoke_has_every_operator():
    names = {name.split()[0] for name in smoke.results(1, 31, torch.float32, "cpu")}
    assert names == set(smoke.ops.__all__) - {"merge_boosts", *smoke.ops.TOGETHER}  # which is torch's own operators


def test_the_smoke_finds_what_is_wrong(monkeypatch, capsys):
    right = smoke.ops.euler_step
    monkeypatch.setattr(smoke.ops, "euler_step", lambda *a, **k: [x + torch.rand(()) for x in right(*a, **k)])
    monkeypatch.setattr(smoke.ops, "topk_sample", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["smoke.py", "--device", "cpu", "--shapes", "3x31"])
    with pytest.raises(SystemExit, match="not right: topk_sample, euler_step$"):
        smoke.main()
    assert "WRONG  euler_step" in capsys.readouterr().out


def test_an_operator_that_breaks_cuda_leaves_the_others_to_another_process(monkeypatch):
    asked = []
    monkeypatch.setattr(smoke.ops, "topk_sample", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(smoke, "is_broken", lambda device: True)
    monkeypatch.setattr(smoke, "others", lambda names: asked.append(names) or 1)
    names = ["cross_entropy", "topk_sample", "topk_renoise", "euler_step"]
    found = smoke.check(names, [(3, 31, torch.float32)], "cpu")
    assert asked == [["topk_renoise", "euler_step"]] and found == "not right: topk_sample; CUDA broke, and more"
