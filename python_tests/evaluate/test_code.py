"""Tasks with holes, and the measures of what is put into them."""

import itertools
import os

import pytest

from klflow_ext.evaluate import code

SOME = int(os.environ.get("KLFLOW_HUMANEVAL", 20))


def some(tasks):
    return tasks[:: max(1, len(tasks) // SOME)]


def test_pass_at_k_is_the_chance_over_all_choices():
    assert code.pass_at_k(10, 3, 2) == pytest.approx(1 - 21 / 45)
    for n, c in ((5, 0), (5, 2), (5, 5), (1, 1)):
        for k in range(1, n + 1):
            chosen = list(itertools.combinations([i < c for i in range(n)], k))
            assert code.pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 0, 1), "samples: got 0"),
        ((3, 4, 1), "passed: got 4"),
        ((3, 1, 4), "k: got 4"),
        ((3, 1, 0), "k: got 0"),
        ((3, True, 1), "passed: got True"),
    ],
)
def test_pass_at_k_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        code.pass_at_k(*arguments)


def test_summary_is_the_mean_over_tasks():
    good, bad = code.Score(False, True, True, "passed"), code.Score(False, True, False, "AssertionError")
    broken = code.Score(False, False, False, "SyntaxError")
    found = code.summary([[good, bad], [broken, broken]], ks=(1, 2))
    assert (found["pass@1"].low, found["pass@1"].high) == (0, 0.5)
    assert {name: figure.mean for name, figure in found.items()} == {
        "pass@1": 0.25,
        "compiles@1": 0.5,
        "exact@1": 0,
        "pass@2": 0.5,
        "compiles@2": 0.5,
        "exact@2": 0,
    }
    with pytest.raises(ValueError, match="scores: got none"):
        code.summary([])


def test_exact_match():
    assert code.exact_match(["  a = 1 \n  b\n"], ["  a = 1\n  b"])
    assert not code.exact_match(["a\nb"], ["a\n b"]) and not code.exact_match(["a", "b"], ["a"])


def test_score_of_a_task():
    task = code.Task("t", ("def f(x):\n", "\n    return y"), ("    y = x + 1",), "assert f(1) == 2")
    assert code.score(task, ["    y = x + 1"]) == code.Score(True, True, True, "passed")
    assert code.score(task, ["    y = 1 + x"]) == code.Score(False, True, True, "passed")
    assert code.score(task, ["    y = x"]) == code.Score(False, True, False, "AssertionError")
    assert code.score(task, ["    y = ("]) == code.Score(False, False, False, "SyntaxError")
    assert code.score(task, ["    y = " + "(" * 10**6]).compiles is False
    for wrong in ([], ["a", "b"], "a"):
        with pytest.raises(ValueError, match="fills: got"):
            task.text(wrong)


@pytest.mark.parametrize("kind, count", [("single-line", 1033), ("random-span", 164)])
def test_infilling_tasks_pass_with_what_stood_there(data_folder, kind, count):
    tasks = code.infilling_tasks(data_folder / "humaneval_infilling", kind)
    assert len(tasks) == count
    for task in some(tasks):
        assert code.score(task, task.removed, timeout=30) == code.Score(True, True, True, "passed"), task.name
    assert not code.score(tasks[0], ["    raise KeyError"]).passed


def test_mbpp_with_lines_removed(data_folder):
    path = data_folder / "mbpp" / "mbpp.jsonl"
    tasks = code.mbpp_tasks(path, 0.1)
    assert len(tasks) == 974 and tasks == code.mbpp_tasks(path, 0.1) != code.mbpp_tasks(path, 0.1, seed=1)
    for task in some(tasks):
        assert code.score(task, task.removed, timeout=30).passed, task.name
    for share in (0.1, 0.5, 1.0):
        for task in code.mbpp_tasks(path, share):
            whole = task.text(task.removed).split("\n", 1)[1]
            gone = sum(bool(line.strip()) for hole in task.removed for line in hole.split("\n"))
            lines = sum(bool(line.strip()) for line in whole.split("\n"))
            assert gone == max(1, round(share * lines)) and "\r" not in whole


def test_mbpp_holes_by_hand(tmp_path):
    row = '{"text": "Do\\n it.", "code": "a = 1\\r\\nb = 2\\r\\n\\r\\nc = 3", "task_id": 7, "test_setup_code": "", "test_list": ["assert c == 3"]}'
    (tmp_path / "m.jsonl").write_text(row)
    [task] = code.mbpp_tasks(tmp_path / "m.jsonl", 1.0)
    assert task == code.Task("MBPP/7", ("# Do it.\n", "\n\n", ""), ("a = 1\nb = 2", "c = 3"), "\nassert c == 3")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="kind: got 'two-line'"):
        code.infilling_tasks(tmp_path, "two-line")
    with pytest.raises(ValueError, match="HumanEval-SingleLine.* cannot be read"):
        code.infilling_tasks(tmp_path)
    (tmp_path / "m.jsonl").write_text("{")
    with pytest.raises(ValueError, match="m.jsonl cannot be read"):
        code.mbpp_tasks(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="share: got 0"):
        code.mbpp_tasks(tmp_path / "m.jsonl", 0)
