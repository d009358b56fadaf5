"""The picture of quality against diversity: what is on its axes is what was given."""

import numpy as np
import pytest
from PIL import Image

from ddistill.report import Point, trade_off, trade_off_figure

LINES = {
    "kd": [Point(0.9, 0.2, "1 step"), Point(0.95, 0.4, "2 steps"), Point(0.97, 0.7, "4 steps")],
    "consistency": [Point(0.8, 0.9, quality_error=0.03, diversity_error=0.05), Point(float("nan"), 0.5)],
}
REFERENCES = {"teacher": Point(0.99, 0.95), "held-out scans": Point(0.96, 0.97)}


def test_lines_and_references_are_the_points_given():
    (axes,) = trade_off_figure(LINES, REFERENCES, quality="−Fréchet", diversity="coverage", title="Digits").axes
    drawn = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert list(drawn) == [*LINES, *REFERENCES]
    for name, points in [*LINES.items(), *((name, [p]) for name, p in REFERENCES.items())]:
        np.testing.assert_array_equal(drawn[name].get_xdata(), [p.quality for p in points])
        np.testing.assert_array_equal(drawn[name].get_ydata(), [p.diversity for p in points])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == ("−Fréchet", "coverage", "Digits")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [*LINES, *REFERENCES]
    assert [(t.get_text(), t.xy) for t in axes.texts] == [(p.label, (p.quality, p.diversity)) for p in LINES["kd"]]
    assert drawn["teacher"].get_linestyle() == "None" != drawn["kd"].get_linestyle()


def test_bars_reach_as_far_as_the_errors():
    (axes,) = trade_off_figure(LINES).axes
    across, up = (bars.get_segments()[0] for bars in axes.collections)
    np.testing.assert_allclose(across, [[0.77, 0.9], [0.83, 0.9]])
    np.testing.assert_allclose(up, [[0.8, 0.85], [0.8, 0.95]])
    assert axes.get_xlim()[0] < 0.77 and axes.get_ylim()[1] > 0.95


def test_no_two_of_many_lines_look_alike():
    (axes,) = trade_off_figure({str(i): [Point(i, i)] for i in range(60)}).axes
    assert len({(a.get_color(), a.get_marker(), a.get_linestyle()) for a in axes.get_lines()}) == 60


def test_the_file_is_a_picture_of_it(tmp_path):
    path = tmp_path / "new" / "front.png"
    trade_off(path, LINES, references=REFERENCES)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size[0] > 1000
        assert np.asarray(image.convert("RGB")).std() > 5
    with pytest.raises(OSError, match="Cannot write the picture"):
        trade_off(tmp_path / "new", LINES)


def test_nothing_to_draw_gets_words():
    with pytest.raises(ValueError, match="Given nothing"):
        trade_off_figure({})
    with pytest.raises(ValueError, match="Given b without a point"):
        trade_off_figure({"a": [Point(0, 0)], "b": []})
