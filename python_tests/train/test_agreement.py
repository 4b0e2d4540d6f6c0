"""What the processes must have alike is compared, and what differs is named on all of them."""

import numpy as np
import pytest
import torch
from processes import together

from klflow_ext import data
from klflow_ext.train import agreement
from klflow_ext.train.agreement import check_agreement, code_version, fingerprint


def differ(rank):
    device = torch.device("cpu")
    check_agreement({"lr": 0.1, "path": {"a": 1, "b": None}}, device)
    check_agreement({"path": {"b": None, "a": 1}, "lr": 0.1}, device)
    with pytest.raises(
        ValueError, match=r"^lr: got 0.1 on process 0 and 1 more, 0.2 on process 2, allowed is the same on all$"
    ):
        check_agreement({"lr": 0.1 + 0.1 * (rank == 2), "seed": 3}, device)
    with pytest.raises(
        ValueError, match=r'^data: got "00" on process 0, "11" on process 1, "22" on process 2, .*; seed: got'
    ):
        check_agreement({"lr": 0.1, "seed": rank, "data": 2 * str(rank)}, device)
    with pytest.raises(ValueError, match="^new: got nothing on process 0, 1 on process 1 and 1 more"):
        check_agreement({"lr": 0.1, **({"new": 1} if rank else {})}, device)
    check_agreement({"lr": 0.1}, device)  # they are still together


@pytest.mark.slow
def test_differences_are_named_on_every_process(tmp_path):
    together(3, tmp_path, differ)


def test_fingerprint(monkeypatch):
    monkeypatch.setattr(agreement, "BLOCK", 64)
    stream = np.arange(5000, dtype=np.int32)  # 313 pieces of 16 numbers, 64 of which are read
    seen = fingerprint(stream)
    assert fingerprint(stream.copy()) == seen
    for place in (0, 15, 4999):
        other = stream.copy()
        other[place] += 1
        assert fingerprint(other) != seen
    assert fingerprint(stream[:-1]) != seen and fingerprint(stream.astype(np.int64)) != seen
    whole = {fingerprint(np.where(np.arange(600) == place, -1, stream[:600])) for place in range(600)}
    assert len(whole) == 600  # of a short one every number counts


def test_the_code_is_known_by_its_source():
    assert code_version().startswith("klflow_ext 0.") and torch.__version__ in code_version()


def test_token_folders_are_known_by_what_they_hold(monkeypatch):
    sources = [{"folder": "/here", "fingerprint": "abc", "split": "train", "weight": 0.25}]
    monkeypatch.setattr(data, "reference", lambda stream: sources)
    seen = fingerprint(None)
    assert seen == "abc train 0.25"
    sources[0]["folder"] = "/there"
    assert fingerprint(None) == seen
    sources[0]["weight"] = 0.5
    assert fingerprint(None) != seen
