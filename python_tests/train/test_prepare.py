"""From texts to tokens to a run: what is held out, flat memory, kills, full disks; and runs on token folders go on bit for bit."""

import builtins
import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from texts import TEXTS, token_folder

from klflow_ext import Denoiser, DenoiserConfig, LogitPath, Run, TrainConfig, Trainer, data
from klflow_ext.train import NetworkChoice, prepare, prepare_tokens
from klflow_ext.train import tokens as module


def texts_of(folder, split):
    tokenizer, tokens = folder.tokenizer(), getattr(folder, split)
    return [tokenizer.decode(tokens.document(i).tolist()) for i in range(tokens.documents)]


def test_what_is_held_out_depends_on_the_text_alone(tmp_path):
    one = token_folder(tmp_path / "one")
    tokenizer = one.folder / "tokenizer.json"
    lots = tmp_path / "lots"
    lots.mkdir()
    for i in range(0, 400, 50):  # other files, in another order, each text twice
        lines = "".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS[i : i + 50], *TEXTS[i : i + 50]])
        (lots / f"{9 - i // 50}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    many = prepare_tokens([lots], tmp_path / "many", tokenizer=tokenizer, heldout=0.1)
    for split in ("train", "heldout"):
        assert sorted(texts_of(many, split)) == sorted(2 * texts_of(one, split))
    again = token_folder(tmp_path / "again")
    assert again.fingerprint == one.fingerprint
    other = token_folder(tmp_path / "other", seed=1)
    assert set(texts_of(other, "heldout")) != set(texts_of(one, "heldout")) and other.fingerprint != one.fingerprint
    half = token_folder(tmp_path / "half", heldout=0.5, tokenizer=tokenizer)
    assert abs(half.heldout.documents - 200) < 50 and set(texts_of(half, "heldout")) > set(texts_of(one, "heldout"))


def test_a_tokenizer_sees_a_share_of_every_file_and_nothing_held_out(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": f"{'abcde'[i]}{j} " * 100}) + "\n" for j in range(1000))
        )
    files = [data.TextFile(tmp_path / f"{i}.jsonl") for i in range(5)]
    source = module._Texts(files, 0.3, 0)
    sample = list(source.sample(100_000))
    assert {text[0] for text in sample} == set("abcde")
    assert 100_000 <= sum(map(len, sample)) < 105_000
    assert not any(source.split(text) for text in sample)
    assert len(list(source.sample(1))) == 1


def test_documents_in_parts(tmp_path, monkeypatch):
    want = token_folder(tmp_path / "whole")
    monkeypatch.setattr(data.pieces, "PART", 50)
    found = token_folder(tmp_path / "parts", tokenizer=want.folder / "tokenizer.json")
    assert max(map(len, TEXTS)) > 300
    assert sorted(texts_of(found, "train") + texts_of(found, "heldout")) == sorted(TEXTS)
    assert len(found.train) + len(found.heldout) == len(want.train) + len(want.heldout)


def test_files_of_nothing_are_left_out_and_named(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n ")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    said = []
    prepare_tokens([tmp_path], tmp_path / "tokens", vocab_size=300, report=said.append)
    assert f"left out as empty: 2 files, such as {tmp_path / 'a.txt'}" in said
    for names, message in ((["a.txt"], "a.txt is empty"), (["a.txt", "b.txt"], "a.txt and 1 more is empty")):
        with pytest.raises(ValueError, match=f"data: .*{message}"):
            prepare_tokens([tmp_path / name for name in names], tmp_path / "none", vocab_size=300)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt", "c.jsonl", "tokens"]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"heldout": 0.0}, r"heldout: got 0.0, allowed is a number in \(0, 1\)"),
        ({"heldout": 1e-9}, "heldout: got 1e-09, by which none of 400 documents in 1 files is held out"),
        ({"heldout": 1 - 1e-9}, "heldout: .* is to train on"),
        ({"vocab_size": 100}, "vocab_size: got 100, allowed is at least 257"),
        ({"seed": -1}, "seed: got -1"),
        ({"shard_tokens": 0}, "shard_tokens: got 0"),
        ({"tokenizer_characters": 0}, "tokenizer_characters: got 0"),
        ({"column": "body"}, "column: got 'body', allowed in line 1 of .*tokens.jsonl"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        token_folder(tmp_path / "tokens", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.jsonl"]


def test_what_stands_in_the_place_is_kept(tmp_path):
    folder = token_folder(tmp_path / "tokens")
    with pytest.raises(ValueError, match="tokens holds a token folder already; --overwrite replaces it$"):
        token_folder(tmp_path / "tokens")
    with pytest.raises(ValueError, match="heldout: got"):
        token_folder(tmp_path / "tokens", heldout=1e-9, overwrite=True)
    assert data.TokenFolder(folder.folder).fingerprint == folder.fingerprint
    assert token_folder(tmp_path / "tokens", overwrite=True, seed=1).fingerprint != folder.fingerprint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="mine holds other files, allowed is a new folder"):
        token_folder(tmp_path / "mine", overwrite=True)


def test_a_full_disk(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, raw):
            if self.file.tell() + len(raw) > 1000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(raw)

        def __enter__(self):
            return self.file.__enter__()

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

    plain = open
    with monkeypatch.context() as patch:
        patch.setattr(module, "open", lambda path, mode: Full(plain(path, mode)), raising=False)
        with pytest.raises(ValueError, match="tokens.new cannot be written: No space left"):
            token_folder(tmp_path / "tokens")
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.jsonl"] and builtins.open is plain


LONG = "".join(json.dumps({"text": f"the cat {i} sat on mat {i * i} and ran " * 20}) + "\n" for i in range(1200))


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    """Peak memory of this process and of one that reads six times the text: 6 MB more, of which all at once take 300."""
    token_folder(tmp_path / "tokens")
    code = """
import resource, sys
from pathlib import Path
from klflow_ext.train import prepare_tokens
prepare_tokens(sys.argv[1:2], Path(sys.argv[2]), tokenizer=Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for count in (1, 7):
        path = tmp_path / f"{count}.jsonl"
        path.write_text(LONG * count)
        command = [sys.executable, "-c", code, path, tmp_path / str(count), tmp_path / "tokens" / "tokenizer.json"]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 40_000, peaks


@pytest.mark.slow
@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_kill_leaves_nothing_in_the_place(tmp_path, number, code):
    path, out = tmp_path / "t.jsonl", tmp_path / "tokens"
    path.write_text(LONG * 20)
    command = [sys.executable, "-m", "klflow_ext", "prepare", str(path), "--out", str(out), "--vocab-size", "300"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    staging = tmp_path / "tokens.new"
    while not (staging / "train-00000.tokens").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code and not out.exists()
    assert staging.exists() == (number == signal.SIGKILL)
    token_folder(out).verify()  # the next one takes its place
    assert not staging.exists()


# ---- training on token folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokens")
    one = token_folder(base / "one")
    return one, token_folder(
        base / "two", [f"a dog {i} " * 20 for i in range(300)], tokenizer=one.folder / "tokenizer.json"
    )


def trainer_of(stream, out=None, **options):
    path = LogitPath(300)
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(300, 1, 2, 32, 32), path)
    return Trainer(model, path, stream, TrainConfig(**{"steps": 12, "batch_size": 4, "length": 16, **options}), out)


@pytest.mark.parametrize("shuffle", ["windows", "documents"])
@pytest.mark.parametrize("mixed", [False, True])
def test_runs_on_token_folders_go_on_bit_for_bit(tmp_path, folders, shuffle, mixed):
    def stream():
        opened = [data.TokenFolder(folder.folder).train for folder in folders]
        return data.Mixture(opened, [2, 1]) if mixed else opened[0]

    whole = trainer_of(stream(), shuffle=shuffle)
    whole.fit(progress=False)
    first = trainer_of(stream(), tmp_path / "run", shuffle=shuffle)
    for _ in range(5):
        first.train_step()
    first.save()
    assert not list(tmp_path.glob("run/*.npy"))
    run = Run(tmp_path / "run")
    second = trainer_of(run.streams()[0], run, **{**run.config()["train"]})
    second.load()
    second.fit(progress=False)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert run.config()["data"] == data.reference(stream()) and len(run.config()["data"]) == 1 + mixed


def test_arrays_are_copied_into_the_run_and_shuffled_too(tmp_path, folders):
    array = folders[0].train[:]
    run = trainer_of(array, tmp_path / "run")
    run.save()
    assert "data" not in run.run.config() and np.load(tmp_path / "run" / "train.npy").tolist() == array.tolist()
    same = trainer_of(folders[0].train)
    assert torch.equal(run.batches.batch(7).tokens, same.batches.batch(7).tokens)
    with pytest.raises(ValueError, match="data: got x, allowed is none: .*run holds its own tokens"):
        run.run.streams(["x"])


SMALL = TrainConfig(steps=2, batch_size=4, length=16)
TINY = NetworkChoice(n_layer=1, n_head=1, n_embd=16)


def prepared(source, out, **options):
    return prepare(source, out, **{"train": SMALL, "network": TINY, **options})


def test_what_a_run_is_prepared_from(tmp_path, folders):
    paths = [folder.folder for folder in folders]
    found = prepared([f"{paths[0]}=1", f"{paths[1]}=3"], tmp_path / "run")
    assert found.trainer.stream.weights == found.heldout.weights == [0.25, 0.75]
    assert found.held_texts == texts_of(folders[0], "heldout")[:100]
    assert found.trainer.model.config.vocab_size == 300
    assert [source["weight"] for source in found.trainer.run.config()["data"]] == [0.25, 0.75]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert isinstance(prepared(tmp_path / "t.jsonl", tmp_path / "plain", vocab_size=300).trainer.stream, np.ndarray)
    other = token_folder(tmp_path / "other", TEXTS[:100])
    few = token_folder(tmp_path / "few", TEXTS[:40], heldout=0.2)
    for source, options, message in (
        ([paths[0], other.folder], {}, "data: got .*other beside .*one, which has another tokenizer"),
        ([paths[0], tmp_path / "t.jsonl"], {}, "t.jsonl is no folder of tokens: it has no index.json"),
        ([tmp_path / "t.jsonl", tmp_path / "t.jsonl"], {}, "allowed are one file of texts or token folders"),
        ([f"{tmp_path / 't.jsonl'}=1"], {}, "allowed are one file of texts or token folders"),
        ([f"{paths[0]}=-1"], {}, r"weights: got \[-1.0\]"),
        (
            [f"{paths[0]}=0", f"{paths[1]}=0"],
            {},
            r"weights: got \[0.0, 0.0\], allowed are numbers >= 0 that are not all 0",
        ),
        (
            [paths[0]],
            {"tokenizer": paths[1] / "tokenizer.json"},
            "tokenizer: got .*, allowed is none beside token folders",
        ),
        ([tmp_path], {}, "data: got the folder .*, allowed is a file; klflow prepare makes a token folder"),
        (
            [few.folder],
            {"train": TrainConfig(length=1500)},
            r"stream: got \d+ tokens in .*few \(heldout\), allowed are more",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(source, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_data_that_moved_or_changed(tmp_path):
    folder = token_folder(tmp_path / "tokens")
    run = prepared(folder.folder, tmp_path / "run").trainer.run
    shutil.move(folder.folder, tmp_path / "moved")
    with pytest.raises(ValueError, match="the run was trained on .*tokens, where no token folder is"):
        run.streams()
    assert len(run.streams([tmp_path / "moved"])[0]) == len(folder.train)
    token_folder(tmp_path / "tokens", seed=1)
    with pytest.raises(ValueError, match=f"has fingerprint .*, allowed is {folder.fingerprint}"):
        run.streams()
