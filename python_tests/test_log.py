"""The log: a line in the file at once, and none of a step that is made again."""

import json

import pytest

from klflow_ext.log import Log


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_in_the_file_at_once(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    for step in range(1, 4):
        log.write({"step": step, "loss": float("nan"), "gradient_norm": 1.5})
        assert steps(tmp_path / "log.jsonl") == list(range(1, step + 1))
    log.close()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in open(tmp_path / "log.jsonl")]
    assert strict[0] == {"step": 1, "loss": None, "gradient_norm": 1.5}


LINES = b"".join(b'{"step": %d}\n' % i for i in range(1, 8))


@pytest.mark.parametrize(
    "content,step,expected",
    [
        (LINES, 7, [1, 2, 3, 4, 5, 6, 7]),
        (LINES, 4, [1, 2, 3, 4]),
        (LINES, 0, []),
        (LINES + b'{"step": 8', 9, [1, 2, 3, 4, 5, 6, 7]),
        (LINES + b'{"step": 8}', 9, [1, 2, 3, 4, 5, 6, 7]),  # without its end, more could be missing
        (LINES + b"\0" * 50, 9, [1, 2, 3, 4, 5, 6, 7]),
        (LINES[:24] + b'[1]\n{"stop": 1}\n{"step": "x"}\n\xff\n\n{"step": 2}\n' + LINES[24:], 9, [1, 2, 3, 4, 5, 6, 7]),
        (LINES + b"x" * 200_000 + b"\n", 9, [1, 2, 3, 4, 5, 6, 7]),
        (LINES + LINES, 9, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_it_is_cut_back_to_a_step(tmp_path, content, step, expected):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    log = Log(path, step)
    assert steps(path) == expected
    log.write({"step": 100})
    log.close()
    assert steps(path) == [*expected, 100] and [f.name for f in tmp_path.iterdir()] == ["log.jsonl"]


def test_it_is_only_written_anew_where_it_must_be(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(LINES)
    before = path.stat().st_ino
    Log(path, 7).close()
    assert path.stat().st_ino == before


def test_a_full_disk_is_named(tmp_path):
    log = Log(tmp_path / "full.jsonl", 0)
    log._file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(ValueError, match="full.jsonl cannot be written: No space left on device"):
        log.write({"step": 1})
    log.close()
    with pytest.raises(ValueError, match="gone/log.jsonl cannot be written: No such file or directory"):
        Log(tmp_path / "gone" / "log.jsonl", 0)
