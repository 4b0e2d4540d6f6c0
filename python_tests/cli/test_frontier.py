"""The picture of klflow eval: bits per byte over entropy."""

import numpy as np
import pytest

from klflow_ext.cli.samples import REAL, SHUFFLED, draw

pytest.importorskip("matplotlib")


def row(name, entropy, bits, **settings):
    figures = {"token_entropy": entropy, "bits_per_byte": bits}
    return {
        "name": name,
        **settings,
        **{key: {"mean": x, "low": x - 0.1, "high": x + 0.2} for key, x in figures.items()},
    }


def test_a_curve_for_each_top_k_and_the_data_marked():
    found = {
        "samples": 7, "length": 12,
        "judge": {"folder": "somewhere/judge", "kind": "llama2.c", "precision": "float32", "context": 5},
        "rows": [row(REAL, 3.5, 1.2), row(SHUFFLED, 9, 9)]
        + [
            row(f"{t} {k}", t + k / 10, k + t, method="segments", nfe=8, temperature=t, top_k=k or None)
            for t in (1.0, 0.5)
            for k in (0, 20)
        ],
    }  # fmt: skip
    figure = draw(found, "a title")
    [panel] = figure.axes
    _, labels = panel.get_legend_handles_labels()
    assert labels == [REAL, "segments, NFE 8, top-k all", "segments, NFE 8, top-k 20"]
    star, *curves = [bars.lines[0] for bars in panel.containers]
    assert star.get_marker() == "*" and star.get_xydata().tolist() == [[3.5, 1.2]]
    assert np.allclose(curves[0].get_xydata(), [[0.5, 0.5], [1, 1]])  # by temperature
    assert np.allclose(curves[1].get_xydata(), [[2.5, 20.5], [3, 21]])
    level, upright = panel.lines[1].get_ydata()[0], panel.lines[0].get_xdata()[0]
    assert (level, upright) == (1.2, 3.5)
    assert sorted(text.get_text() for text in panel.texts) == ["T 0.5", "T 0.5", "T 1", "T 1"]
    bar = panel.containers[1].lines[2][1].get_segments()[0]
    assert np.allclose(bar, [[0.5, 0.4], [0.5, 0.7]])
    assert (
        "7 texts of 12 tokens" in figure.get_supxlabel()
        and "judge (llama2.c, float32, context 5)" in figure.get_supxlabel()
    )
