"""Layouts: what is allowed, and which position is in which set."""

import pytest
import torch

from klflow_ext.path import Layout


def test_positions_are_counted_among_those_that_are_free():
    layout = Layout(((0, 4), (2, 6), (1, 3, 5, 7)))
    assert len(layout) == 3 and layout.period == 8
    given = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0, 0, 0, 0, 1], [1] * 10]).bool()
    assert layout.order(given).tolist() == [[1, 3, 2, 3, 1, 3, 2, 3, 1, 3], [0, 1, 3, 0, 0, 2, 3, 1, 3, 0], [0] * 10]


def test_text_and_back():
    layout = Layout([[0, 4], [2, 6], [1, 3, 5, 7]])
    assert str(layout) == "0 4 | 2 6 | 1 3 5 7"
    assert Layout.parse(str(layout)) == layout == Layout.parse("0,4|2,6|1,3,5,7")
    assert Layout.stride(3) == Layout.parse("0 | 1 | 2")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (((0, 2), (2, 1)), "2 twice"),
        (((0, 3), (1,)), "no 2"),
        (((1, 2),), "no 0"),
        (((0, -1),), "got no 0"),
        (((0,), ()), "1 of them empty"),
        ((), "0 sets"),
    ],
)
def test_sets_that_miss_or_repeat_a_position(sets, message):
    with pytest.raises(ValueError, match=f"layout: got .*{message}|layout: .*{message}"):
        Layout(sets)


@pytest.mark.parametrize("sets", [3, "01", ((0.5,),), (0, 1), (("a",),)])
def test_no_sets_at_all(sets):
    with pytest.raises(TypeError, match="layout: got"):
        Layout(sets)


@pytest.mark.parametrize("text", ["", "0 | | 1", "0 a", "0 2 | 2 1"])
def test_text_that_is_none(text):
    with pytest.raises(ValueError, match="layout: got"):
        Layout.parse(text)


def test_sets_beyond_the_free_positions():
    layout = Layout(((0,), (4,), (1, 2, 3, 5)))
    layout.check_fits(torch.tensor([[0] * 5, [1] * 5]).bool())
    with pytest.raises(ValueError, match="layout: got 3 sets for 4 free positions"):
        layout.check_fits(torch.tensor([[0] * 5, [1, 0, 0, 0, 0]]).bool())
