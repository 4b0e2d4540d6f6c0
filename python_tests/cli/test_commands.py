"""The command line: what it prints, and what it refuses before any work."""

import json
import shutil
import subprocess
import sys

import pytest
from runs import contents

from klflow_ext import (
    Run,
    build_info,
    data,
)
from klflow_ext.cli import evaluate
from klflow_ext.evaluate.text import Interval


@pytest.mark.slow
def test_command_line_as_a_program():
    done = subprocess.run([sys.executable, "-m", "klflow_ext", "info"], capture_output=True, text=True)
    assert done.returncode == 0 and "CPU kernels" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "-m", "klflow_ext", "sample", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and "no run folder" in done.stderr and "Traceback" not in done.stderr


def test_info_needs_no_extra(klflow, monkeypatch):
    for module in ("tyro", "tokenizers", "safetensors"):
        monkeypatch.setitem(sys.modules, module, None)
    done = klflow("info")
    assert done.returncode == 0 and "CUDA kernels" in done.stdout and "CPU kernels" in done.stdout
    done = klflow("sample", "nowhere")
    assert done.returncode == 1 and "this command needs the train extra: pip install" in done.stderr


@pytest.mark.parametrize("source", ["bound by the loader", ""])
def test_info_tells_where_the_stream_function_is(klflow, monkeypatch, source):
    built = {**build_info(), "cuda": True, "nvcc": "13.0", "cuda_arch": "sm_90+PTX", "cuda_stream": source}
    monkeypatch.setattr("klflow_ext.cli.about.build_info", lambda: built)
    lines = klflow("info").stdout.splitlines()
    assert "CUDA kernels     sm_90+PTX (nvcc 13.0)" in lines
    assert f"torch's stream   {source or 'not found: this torch has no CUDA'}" in lines


@pytest.mark.slow
def test_command_line(klflow, tmp_path):
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60)))
    run = tmp_path / "run"
    small = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--vocab-size", "300", "--length", "16"]
    done = klflow("train", "--data", str(tmp_path / "t.txt"), "--out", str(run), "--steps", "3", *small)
    assert done.returncode == 0, done.stderr
    assert "unigram entropy" in done.stdout
    done = klflow("train", "--resume", str(run), "--more-steps", "2")
    assert done.returncode == 0 and "from step 3" in done.stderr, done.stderr
    for command in (
        ["sample", str(run), "--steps", "3", "--length", "8", "--count", "2"],
        ["complete", str(run), "--steps", "3", "--length", "8", "--prompt", "one two"],
        ["infill", str(run), "--steps", "3", "--text", "one {?5} three"],
    ):
        done = klflow(*command)
        assert done.returncode == 0 and "3 passes" in done.stderr and "3 passes" not in done.stdout, done.stderr
    for command, message in (
        (["sample", str(tmp_path)], "no run folder"),
        (["train", "--data", str(tmp_path / "none.txt")], "cannot be read"),
        (["infill", str(run), "--text", "no hole"], "text: got 'no hole'"),
        (["sample", str(run), "--method", "fast"], "method: got 'fast', allowed is one of ['basic', "),
        (["sample", str(run), "--temperature", "1", "0"], "temperature: got 0"),
        (["sample", str(run), "--device", "nothing"], "device: nothing cannot be used"),
        (["train", "--path", "mask", "--input", "simplex"], "input: got 'simplex', allowed on path mask is 'tokens'"),
        (["train", "--tokenizer", str(tmp_path / "t.txt")], "t.txt cannot be read"),
        (["train", "--ema", "1"], "ema: got 1.0"),
        (["sample", str(run), "--length", "999"], "length: got a length of 999"),
        (["train", "--vocab-size", "100"], "vocab_size: got 100"),
        (["train", "--out", str(tmp_path / "t.txt")], "t.txt is a file, allowed is a folder"),
        (["eval", str(run), "--judge", str(tmp_path)], "has no stories260K.bin"),
        (
            ["train", "--data", str(tmp_path / "t.txt"), "--out", str(run)],
            "run holds a run already; --overwrite replaces",
        ),
        (
            ["train", "--data", str(tmp_path / "t.txt"), "--out", str(run), "--overwrite", "--length", "99999"],
            "length: got 99999, allowed is less than the",
        ),
        (["train", "--resume", str(run), "--steps", "5", "--lr=1e-9"], "resume: got --lr, --steps beside it"),
        (["train", "--resume", str(run)], "is finished, at step 5"),
        (["train", "--more-steps", "3"], "more_steps: got 3, allowed is only with --resume"),
        (["sample", str(run), "--count", "-1"], "count: got -1"),
        (["sample", str(run), "--device", "meta"], "device: got meta, allowed is cpu or cuda"),
        (["train", "--n-layer", "0"], "n_layer: got 0"),
        (["eval", str(run), "--count", "0"], "count: got 0"),
        (["eval", str(run), "--length", "0"], "length: got 0"),
        (["complete", str(run), "--prompt", "caf\udce9"], "prompt: got b'caf\\xe9', allowed is UTF-8"),
        (["infill", str(run), "--text", "a{?99999999999999999999}b"], "text: got the hole {?99999999999999999999}"),
    ):
        before = contents(run)
        done = klflow(*command)
        assert done.returncode != 0 and message in done.stderr, command
        assert contents(run) == before, command
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", ["mask", "uniform", "linear", "sphere", "autoregressive"])
def test_command_line_of_the_baselines(klflow, tmp_path, path):
    """Every baseline is one word; a tokenizer file serves another run."""
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60)))

    tokenizer = data.train_tokenizer(["one two three four"], 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run = tmp_path / "run"
    done = klflow(
        "train", "--path", path, "--data", str(tmp_path / "t.txt"), "--out", str(run), "--steps", "2", "--length", "16",
        "--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--tokenizer", str(tmp_path / "tokenizer.json"),
        "--dtype", "bfloat16", "--ema", "0.9",
    )  # fmt: skip
    assert done.returncode == 0 and "unigram entropy" in done.stdout, done.stderr
    done = klflow("complete", str(run), "--steps", "3", "--length", "8", "--prompt", "one two")
    assert done.returncode == 0 and done.stdout.startswith("one two"), done.stderr
    done = klflow("eval", str(run), "--likelihood", "--count", "3", "--length", "16")
    assert done.returncode == 0, done.stderr
    exact = [line for line in done.stdout.splitlines() if line.endswith(" bits per byte")]
    bounds = [line for line in done.stdout.splitlines() if line.endswith(" bits per byte (upper bound)")]
    order = {"autoregressive": ["left"], "mask": ["slices,"] * 3}.get(path, ["segments,"] * 3)
    assert [line.split()[0] for line in exact] == order
    assert [line.split()[0] for line in bounds] == (["masks,"] if path == "mask" else [])


def test_command_line_of_slices(klflow, tmp_path):
    """Trained on two streams, such a run samples by slices without being told, and goes on as any other."""
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60)))
    run = tmp_path / "run"
    small = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--vocab-size", "300", "--length", "16"]
    done = klflow("train", "--data", str(tmp_path / "t.txt"), "--out", str(run), "--steps", "3", *small)
    assert done.returncode == 0, done.stderr
    assert klflow("train", "--resume", str(run), "--more-steps", "1").returncode == 0
    for command in (
        ["sample", str(run), "--steps", "4", "--length", "8", "--count", "2"],
        ["sample", str(run), "--steps", "4", "--length", "8", "--slice-steps", "2"],
        ["complete", str(run), "--steps", "4", "--length", "9", "--prompt", "one two"],
        ["infill", str(run), "--steps", "4", "--text", "one {?5} three {?3} four"],
    ):
        done = klflow(*command)
        assert done.returncode == 0 and "4 passes" in done.stderr, (command, done.stderr)
    done = klflow("eval", str(run), "--likelihood", "--count", "3", "--length", "16")
    assert done.returncode == 0, done.stderr
    names = [line.split("  ")[1].strip() for line in done.stdout.splitlines() if "bits per byte" in line]
    assert names == ["slices, 4 passes", "slices, 8 passes", "slices, 16 passes", "all at once, race of the noise"]
    done = klflow("train", "--time", "token", "--data", str(tmp_path / "t.txt"), "--out", str(tmp_path / "b"), *small)
    assert (
        done.returncode != 0
        and "time: got 'token', allowed is 'none', 'add' or 'adaln' where slices is True" in done.stderr
    )


def test_command_line_of_token_folders(klflow, tmp_path):
    """Texts are prepared, two folders are trained on, and the run goes on where they have moved."""
    for name, word in (("a", "cat"), ("b", "dog")):
        (tmp_path / f"{name}.txt").write_text(
            "\n<|endoftext|>\n".join(f"one {word} {i} four\n" * 20 for i in range(100))
        )
    done = klflow("prepare", "a.txt", "*.tx?", "--out", "both", "--vocab-size", "300", "--heldout", "0.2")
    assert done.returncode == 0 and "in 2 files" in done.stderr and "next: klflow train --data both" in done.stdout
    for name in ("a", "b"):
        done = klflow("prepare", f"{name}.txt", "--out", name, "--tokenizer", "both/tokenizer.json", "--heldout", "0.2")
        assert done.returncode == 0, done.stderr
    assert "a is whole: fingerprint" in klflow("prepare", "--verify", "a").stdout
    small = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--length", "16", "--steps", "2", "--out", "run"]
    done = klflow("train", "--data", "a=0.7", "b=0.3", "--shuffle", "documents", *small)
    assert done.returncode == 0 and "a: 70.0% of the sequences" in done.stderr, done.stderr
    (tmp_path / "b").rename(tmp_path / "c")
    done = klflow("train", "--resume", "run", "--more-steps", "1")
    assert done.returncode == 1 and "where no token folder is; --data says where it is now" in done.stderr
    done = klflow("train", "--resume", "run", "--more-steps", "1", "--data", "a", "c")
    assert done.returncode == 0 and "unigram entropy" in done.stdout, done.stderr
    assert klflow("eval", "run", "--length", "16").returncode == 0  # the run has learned where they are
    for command, message in (
        (["prepare", "--out", "x"], "data: got no file"),
        (["prepare", "a.txt", "--out", "a"], "a holds a token folder already"),
        (["prepare", "a.txt", "--out", "a.txt"], "a.txt is a file, allowed is a folder"),
        (["prepare", "--verify", "run"], "run is no folder of tokens"),
        (["train", "--data", "a=x"], "data: got 'a=x', allowed is PATH or PATH=WEIGHT"),
        (["train", "--data", "a", "--shuffle", "words"], "invalid choice"),
    ):
        done = klflow(*command)
        assert done.returncode == 1 and message in done.stderr or command[-1] == "words", (command, done.stderr)


def test_table_of_samples(klflow, tmp_path):
    """Real text first, a row for each temperature and top-k, and a file with what they were made by."""
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60)))
    small = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--vocab-size", "300", "--length", "16"]
    assert klflow("train", "--data", "t.txt", "--out", "run", "--steps", "3", *small).returncode == 0
    short = ["--length", "12", "--steps", "3"]
    done = klflow(
        "eval", "run", *short, "--samples", "4", "--temperature", "0.5", "1", "--top-k", "1", "0", "--method", "sampling",
        "--seed", "5", "--json", "table.json",
    )  # fmt: skip
    assert done.returncode == 0 and "held-out loss" in done.stdout, done.stderr
    lines = done.stdout[done.stdout.index("4 texts of 12 tokens") :].splitlines()
    names = [line.split("  ")[0] for line in lines[2:]]
    assert names == ["held-out text", "its tokens shuffled"] + [
        f"sampling, NFE 3, T {t}, top-k {k}" for t in ("0.5", "1") for k in ("1", "all")
    ]
    found = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in found["rows"]] == names and found["judge"] is None
    assert (found["samples"], found["length"], found["precision"]) == (4, 12, "float32")
    assert found["checkpoint"].endswith("step-3")
    row = found["rows"][-1]
    assert (row["nfe"], row["temperature"], row["top_k"], row["seed"], row["method"]) == (3, 1.0, None, 5, "sampling")
    assert row["token_entropy"]["low"] <= row["token_entropy"]["mean"] <= row["token_entropy"]["high"]
    assert found["rows"][0]["copied"]["mean"] > row["copied"]["mean"]
    done = klflow("eval", "run", *short, "--samples", "2")
    assert "slices, NFE 3, T 1, top-k 20" in done.stdout
    for command, message in (
        (["--samples", "2", "--plot", "x.png"], "plot: got x.png, allowed is only with --judge"),
        (["--judge", "j", "--plot", "x.pdf"], "plot: got x.pdf, allowed is a file that ends with .png"),
        (["--samples", "1"], "samples: got 1, allowed is an integer >= 2"),
        (
            ["--json", "x.json"],
            "json: got x.json, allowed is only with --samples, --judge, --infilling or --conditional",
        ),
    ):
        done = klflow("eval", "run", *command)
        assert done.returncode == 1 and message in done.stderr


def test_table_under_the_judge(klflow, tmp_path, data_folder):
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60)))
    small = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--vocab-size", "300", "--length", "16"]
    assert klflow("train", "--data", "t.txt", "--out", "run", "--steps", "3", *small).returncode == 0
    judge = str(data_folder / "stories260K")
    done = klflow(
        "eval", "run", "--length", "12", "--steps", "2", "--samples", "4", "--judge", judge, "--json", "t.json",
        "--plot", "t.png",
    )  # fmt: skip
    assert done.returncode == 0 and "bits per byte" in done.stdout, done.stderr
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG") and "picture: t.png" in done.stdout
    found = json.loads((tmp_path / "t.json").read_text())
    assert len(found["judge"]["sha256"]) == 64 and found["judge"]["context"] == 512
    real, _, sampled = (row["bits_per_byte"] for row in found["rows"])
    assert real["low"] <= real["mean"] <= real["high"] < sampled["mean"]
    assert found["rows"][0]["distance"]["mean"] < found["rows"][2]["distance"]["low"] and found["distance_from"] == 31
    tokens = ["--tokenizer", "run/tokenizer.json", *small[:6], "--length", "16"]
    assert (
        klflow(
            "train", "--data", "t.txt", "--out", "ar", "--path", "autoregressive", "--steps", "3", *tokens
        ).returncode
        == 0
    )
    done = klflow(
        "eval", "run", "--length", "12", "--steps", "2", "--samples", "4", "--judge", "ar", "--json", "t.json"
    )
    assert done.returncode == 0 and "bits per byte" in done.stdout, done.stderr
    found = json.loads((tmp_path / "t.json").read_text())["judge"]
    assert (found["kind"], found["folder"], found["context"], found["precision"]) == ("klflow_ext", "ar", 17, "float32")
    done = klflow("eval", "run", "--length", "12", "--steps", "2", "--count", "2", "--judge", judge)
    assert done.returncode == 0 and "2 texts of 12 tokens" in done.stdout and "llama2.c, float32" in done.stdout, (
        done.stderr
    )


def test_infilling(klflow, tmp_path, data_folder):
    (tmp_path / "t.txt").write_text(
        "\n<|endoftext|>\n".join(f"def f(x):\n    return x + {i}\n" * 20 for i in range(60))
    )
    small = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--vocab-size", "300", "--length", "32"]
    assert klflow("train", "--data", "t.txt", "--out", "run", "--steps", "3", *small).returncode == 0
    folder = str(data_folder / "humaneval_infilling")
    done = klflow(
        "eval", "run", "--length", "12", "--steps", "2", "--infilling", folder, "--tasks", "3", "--tries", "2", "--json", "i.json",
    )  # fmt: skip
    assert done.returncode == 0 and "3 tasks of single-line, 2 fills each" in done.stdout, done.stderr
    [found] = json.loads((tmp_path / "i.json").read_text())["infilling"]
    assert (found["tasks"], found["tries"], found["nfe"], found["window"]) == (3, 2, 2 * found["windows"], 32)
    assert set(found["figures"]) == {f"{name}@{k}" for name in ("pass", "compiles", "exact") for k in (1, 2)}
    assert set(found["left_empty"]["pass@1"]) == {"mean", "low", "high"} and found["sandbox"]["layers"]
    (tmp_path / "f.py").write_text("def f(x):\n    a = x\n    b = a\n    return b\n" * 3)
    done = klflow(
        "eval", "run", "--length", "12", "--steps", "2", "--infilling", "f.py", "--kind", "functions", "--share", "0.3", "1",
        "--tasks", "2", "--json", "f.json",
    )  # fmt: skip
    assert done.returncode == 0 and "2 tasks of functions with 30% of the lines removed" in done.stdout, done.stderr
    rows = json.loads((tmp_path / "f.json").read_text())["infilling"]
    assert [(row["kind"], row["share"], row["holes"]) for row in rows] == [("functions", 0.3, 2), ("functions", 1.0, 2)]
    assert set(rows[0]["figures"]) == {"compiles@1", "exact@1"}
    for command, message in (
        (["--infilling", "nowhere"], "cannot be read"),
        (["--infilling", "nowhere", "--kind", "functions"], "nowhere cannot be read"),
        (["--infilling", "t.txt", "--kind", "functions"], "t.txt without a task"),
        (["--infilling", folder, "--tries", "0"], "tries: got 0"),
        (["--infilling", folder, "--window", "257"], "window: got 257, allowed is 2 to the run's max_length, 256"),
    ):
        done = klflow("eval", "run", *command)
        assert done.returncode == 1 and message in done.stderr


def test_conditional(stories, klflow, tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(f"Once upon a time there was a cat. {i}" for i in range(300)))
    rows = [{"prompt": f"There was a cat {i}", "text": f"Once upon a time {i} there was a cat {i}"} for i in range(300)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ["--data", "t.txt", "--length", "12", "--steps", "2", "--conditional", "p.jsonl", "--new-tokens", "8"]
    done = klflow("eval", *short, "--prompts", "3", "--tries", "2", "--json", "c.json")
    assert done.returncode == 0 and "3 prompts, 2 texts of 8 tokens each, at most 2 passes" in done.stdout, done.stderr
    lines = done.stdout.splitlines()[-5:]
    assert [line.split("  ")[1] for line in lines] == [
        "written", "written, best", "written to another prompt", "written to another prompt, best", "another prompt's text",
    ]  # fmt: skip
    found = json.loads((tmp_path / "c.json").read_text())["conditional"]
    assert (found["prompts"], found["tries"], found["window"], found["options"]["top_k"]) == (3, 2, 32, 20)
    assert len(found["texts"][0]["written"]) == 2 and found["figures"]["samples"]["chrf"]["best"]["mean"] >= 0
    for command, message in (
        (["--prompts", "1"], "prompts: got 1, allowed is an integer >= 2"),
        (["--new-tokens", "40"], "new_tokens: got 40 in a window of 32"),
        (["--conditional", "t.txt"], "conditional: t.txt cannot be read at line 1"),
    ):
        done = klflow("eval", *short, *command)
        assert done.returncode == 1 and message in done.stderr, (command, done.stderr)


def test_eval_refuses_before_any_work(stories, klflow, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("\n".join(f"Once upon a time there was a cat. {i}" for i in range(300)))
    rows = [{"prompt": f"A cat {i}", "text": f"There was a cat {i} and a cat"} for i in range(300)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "f.py").write_text("def f(x):\n    a = x\n    b = a\n    return b\n" * 3)
    monkeypatch.setattr(evaluate, "print_losses", lambda *a: pytest.fail("worked"))
    monkeypatch.setattr(evaluate, "need_sacrebleu", lambda: None)
    table, infilling, conditional = (
        ["--samples", "4"],
        ["--infilling", "f.py", "--kind", "functions"],
        ["--conditional", "p.jsonl", "--new-tokens", "8"],
    )
    for command, message in (
        ([*table, "--method", "sampling", "nope"], "method: got 'nope', allowed is one of ["),
        ([*table, "--method", "slices"], "method: got 'slices', allowed is another method for this network"),
        (["--method", "nope"], "method: got 'nope'"),
        ([*table, "--temperature", "1", "-1"], "temperature: got -1.0"),
        ([*table, "--top-k", "-1"], "top_k: got -1"),
        ([*table, "--seed", str(2**70)], "seed: got"),
        ([*table, "--length", "33"], "length: got 33, allowed is at most"),
        ([*table, "--steps", "0"], "steps: got 0, allowed is an integer >= 1"),
        ([*table, "--mauve"], "mauve: got it without --judge"),
        ([*table, "--mauve", "--judge", "x"], "samples: got 4, allowed with --mauve is an integer >= 40"),
        ([*table, "--judge", "x"], "judge: x has no stories260K.bin"),
        ([*table, "--json", "nowhere/x.json"], "json: got nowhere/x.json"),
        ([*infilling, "--method", "nope"], "method: got 'nope'"),
        ([*infilling, "--share", "0"], "share: got 0.0"),
        ([*infilling, "--tasks", "0"], "tasks: got 0"),
        ([*infilling, "--tries", "0"], "tries: got 0"),
        ([*conditional, "--method", "nope"], "method: got 'nope'"),
        ([*conditional, "--tries", "0"], "tries: got 0, allowed is an integer >= 1"),
        ([*conditional, "--prompts", "1"], "prompts: got 1, allowed is an integer >= 2"),
        ([*conditional, "--new-tokens", "0"], "new_tokens: got 0"),
        ([*conditional, "--new-tokens", "32"], "new_tokens: got 32 in a window of 32"),
        ([*conditional, "--window", "1"], "window: got 1, allowed is 2 to"),
    ):
        done = klflow("eval", "--data", "t.txt", "--length", "12", *command)
        assert done.returncode == 1 and message in done.stderr, (command, done.stderr)
    monkeypatch.setattr("klflow_ext.evaluate.infilling.permitted_layers", lambda: raised(RuntimeError("no sandbox")))
    done = klflow("eval", "--data", "t.txt", "--length", "12", *infilling)
    assert done.returncode == 1 and "no sandbox" in done.stderr


def raised(error):
    raise error


def test_mauve_of_the_table(stories, klflow, tmp_path, data_folder, monkeypatch):
    """With a stand-in for the library, whose figures test_distance.py looks at; what it was asked for stands in the file."""
    (tmp_path / "t.txt").write_text("\n".join(f"Once upon a time there was a cat. {i}" for i in range(3000)))
    short = ["--data", "t.txt", "--length", "8", "--steps", "2", "--judge", str(data_folder / "stories260K"), "--mauve"]
    monkeypatch.setitem(sys.modules, "mauve", None)
    done = klflow("eval", *short, "--samples", "40")
    assert done.returncode == 1 and "pip install 'klflow_ext[mauve]'" in done.stderr
    monkeypatch.setattr("klflow_ext.cli.samples.need_mauve", lambda: None)
    (tmp_path / "p.txt").write_text("\n".join(f"Once upon a time there was a cat. {i}" for i in range(40)))
    done = klflow("eval", *short, "--samples", "40", "--data", "p.txt")
    assert done.returncode == 1 and "mauve: got" in done.stderr and "40 more such texts" in done.stderr
    monkeypatch.setattr("klflow_ext.evaluate.table.mauve", lambda found, real, seed: Interval(len(found), 0, len(real)))
    monkeypatch.setattr("klflow_ext.cli.samples.version", lambda name: "1")
    done = klflow("eval", *short, "--samples", "40", "--json", "m.json")
    assert done.returncode == 0 and "MAUVE" in done.stdout, done.stderr
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["mauve"]["num_buckets"] == 2 and found["mauve"]["library"] == "mauve-text 1"
    assert [row["mauve"]["mean"] for row in found["rows"]] == [40] * 3
    assert found["rows"][0]["mauve"]["high"] == found["distance_from"]


def test_table_names_the_checkpoint_that_was_read(klflow, tmp_path, monkeypatch):
    """Not one that training puts in its place while it is read."""
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60)))
    small = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--vocab-size", "300", "--length", "16"]
    assert klflow("train", "--data", "t.txt", "--out", "run", "--steps", "3", *small).returncode == 0
    read, asked = Run.model, []

    def model(self, given=None):
        found = read(self, given)
        asked.append(self.last().folder.name)
        if len(asked) == 1:
            shutil.copytree(self.last().folder, tmp_path / "run" / "checkpoint-0009-step-3")
        return found

    monkeypatch.setattr(Run, "model", model)
    done = klflow("eval", "run", "--length", "12", "--steps", "2", "--samples", "2", "--json", "t.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "t.json").read_text())["checkpoint"] == "checkpoint-0009-step-3" == asked[-1]
