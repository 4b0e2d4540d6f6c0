"""Tasks with holes, and the measures of what is put into them."""

import itertools
import json
import os
from types import SimpleNamespace

import pytest

from klflow_ext.data import standard_library
from klflow_ext.evaluate import code, run_program

SOME = int(os.environ.get("KLFLOW_HUMANEVAL", 20))


def some(tasks):
    return tasks[:: max(1, len(tasks) // SOME)]


def with_what_stood_there(tasks):
    tasks = some(tasks)
    return zip(tasks, code.scores(tasks, [[task.removed] for task in tasks], timeout=30), strict=True)


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


def test_scores_of_many_fills(monkeypatch):
    """Each as by itself; what does not compile is never run, equal fills are run once."""
    tested = code.Task("t", ("def f(x):\n", "\n    return y"), ("    y = x + 1",), "assert f(1) == 2")
    bare = code.Task("u", ("a = ", "\n"), ("1",), None)
    fills = [[["    y = 1 + x"], ["    y = ("], ["    y = 1 + x"]], [["2"], [")"], ["1"]]]
    wanted = [[code.score(task, some) for some in tries] for task, tries in zip([tested, bare], fills, strict=True)]
    runs = []
    monkeypatch.setattr(code, "run_program", lambda *a, **o: runs.append(a[0]) or run_program(*a, **o))
    assert code.scores([tested, bare], fills) == wanted
    assert len(runs) == 2 and "compile(" in runs[0] and runs[1] == tested.program(fills[0][0])
    assert wanted[1] == [
        code.Score(False, True, None, "compiles"),
        code.Score(False, False, None, "SyntaxError"),
        code.Score(True, True, None, "compiles"),
    ]
    assert set(code.summary(wanted[1:])) == {"compiles@1", "exact@1"}
    with pytest.raises(ValueError, match="fills: got those of 1 tasks"):
        code.scores([tested, bare], fills[:1])


def test_compiling_many_of_which_one_takes_the_compiler_down(monkeypatch):
    sources = ["a = 1", "a = (", "xxx\0", "a = '\udce9'", "(" * 10**6, "print('\\d')", "\n1"]
    found = code.compile_passes(sources)
    assert [bool(reason) for reason in found] == [False, True, True, True, True, False, False]
    assert found[1] == "SyntaxError"
    runs = []

    def run(source, **options):
        runs.append(source)
        ends = "'down'" in source
        return SimpleNamespace(passed=not ends, output="\n" * source.count("'a'"), reason="signal SIGSEGV")

    monkeypatch.setattr(code, "run_program", run)
    wanted = [""] * 16
    wanted[5] = "signal SIGSEGV"
    assert code.compile_passes(["down" if reason else "a" for reason in wanted]) == wanted
    assert len(runs) == 1 + 2 * 4


@pytest.mark.parametrize("kind, count", [("single-line", 1033), ("random-span", 164)])
def test_infilling_tasks_pass_with_what_stood_there(data_folder, kind, count):
    tasks = code.infilling_tasks(data_folder / "humaneval_infilling", kind)
    assert len(tasks) == count
    for task, [score] in with_what_stood_there(tasks):
        assert score == code.Score(True, True, True, "passed"), task.name
    assert not code.score(tasks[0], ["    raise KeyError"]).passed


def test_mbpp_with_lines_removed(data_folder):
    path = data_folder / "mbpp" / "mbpp.jsonl"
    tasks = code.mbpp_tasks(path, 0.1)
    assert len(tasks) == 974 and tasks == code.mbpp_tasks(path, 0.1) != code.mbpp_tasks(path, 0.1, seed=1)
    for task, [score] in with_what_stood_there(tasks):
        assert score.passed, task.name
    for share in (0.1, 0.5, 1.0):
        for task in code.mbpp_tasks(path, share):
            whole = task.text(task.removed).split("\n", 1)[1]
            gone = sum(bool(line.strip()) for hole in task.removed for line in hole.split("\n"))
            lines = sum(bool(line.strip()) for line in whole.split("\n"))
            assert gone == max(1, round(share * lines)) and "\r" not in whole


def test_humaneval_with_lines_removed(data_folder):
    path = data_folder / "humaneval" / "HumanEval.jsonl.gz"
    by_share = [code.humaneval_tasks(path, share) for share in code.SHARES]
    assert {len(tasks) for tasks in by_share} == {164} and by_share[0] == code.humaneval_tasks(path, 0.1)
    for task, [score] in with_what_stood_there(by_share[4][:SOME:3]):
        assert score.passed, task.name
    for less, more in itertools.pairwise(by_share):  # nested: what a smaller share removes, a larger one does too
        for a, b in zip(less, more, strict=True):
            gone = [{line for hole in task.removed for line in hole.split("\n")} for task in (a, b)]
            assert gone[0] <= gone[1] and a.text(a.removed) == b.text(b.removed)
    whole = by_share[-1][0]
    assert whole.kept[0].rstrip().endswith('"""') and whole.removed[0].startswith("    for idx, elem in")


SOURCE = """
import os

class A:
    @property
    def area(self,
             unit):
        '''What it is.

        More.'''
        # from here on
        a = self.a

        def inner():
            return 1
        return a * inner()

def short(x): return x
def described(x):
    '''Only this.'''
async def other(x):
    y = x
    return y
"""


def test_functions_with_lines_removed():
    [area] = code.function_tasks([SOURCE, "def broken("], 1.0)
    assert area.name == "0:6:area" and area.tests is None
    assert area.kept[0].startswith("@property\ndef area(") and area.kept[0].endswith("    More.'''\n")
    assert area.removed == (
        "    # from here on\n    a = self.a",
        "    def inner():\n        return 1\n    return a * inner()",
    )
    assert [task.name for task in code.function_tasks([SOURCE], 0.5, lines=(1, 2))] == ["0:21:other"]
    library = code.function_tasks(standard_library()[:8], 0.3)
    assert len(library) > 50 and not any(code.compile_passes([task.text(task.removed) for task in library]))
    with pytest.raises(ValueError, match="share: got 1.5"):
        code.function_tasks([], 1.5)


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
    row = {"task_id": 1, "text": "", "code": "a", "test_setup_code": "", "test_list": ["a", 2]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"tasks: .* line 1: got .*, allowed is an object with .*test_list \(list\)"):
        code.mbpp_tasks(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="share: got 0"):
        code.mbpp_tasks(tmp_path / "m.jsonl", 0)
