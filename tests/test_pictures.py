import numpy as np
import pytest
from PIL import Image

from ddistill.report import image_grid, save_loss_plot, save_sample_sheet, save_scatter
from ddistill.report.pictures import _running_mean


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_images_row_by_row(channels):
    x = np.random.default_rng(0).integers(0, 256, (5, 2, 3, channels))
    grid = image_grid(x / 255, columns=2)
    assert grid.shape == (6, 6, channels) and grid.dtype == np.uint8
    for i in range(5):
        top, left = 2 * (i // 2), 3 * (i % 2)
        assert np.array_equal(grid[top : top + 2, left : left + 3], x[i])
    assert not grid[4:, 3:].any()


def test_grid_clips():
    x = np.array([-0.5, 0.0, 1.0, 7.0]).reshape(1, 2, 2, 1)
    assert image_grid(x, 1).ravel().tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.ones((4, 8, 8)), r"shape \(4, 8, 8\); expected \[N, H, W, C\]"),
        (np.ones((4, 8, 8, 2)), "C = 1 or 3"),
        (np.ones((0, 8, 8, 1)), "N >= 1"),
        (np.where(np.arange(4) == 2, np.nan, 1).reshape(4, 1, 1, 1), "1 of 4 hold NaN or Inf, the first is 2"),
    ],
)
def test_images_that_cannot_be_drawn(x, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        image_grid(x, 2)
    with pytest.raises(ValueError, match=f"row 'student'.*{words}"):
        save_sample_sheet(tmp_path / "a.png", [("student", x)])
    with pytest.raises(ValueError, match="columns is 0"):
        image_grid(np.ones((1, 2, 2, 1)), 0)


def blocks(picture: np.ndarray, colours: np.ndarray, scale: int) -> np.ndarray:
    """Top-left corners at which the picture shows these [h, w, 3] colours enlarged by `scale`."""
    pattern = colours.repeat(scale, 0).repeat(scale, 1)
    windows = np.lib.stride_tricks.sliding_window_view(picture, pattern.shape)[:, :, 0]
    return np.argwhere((windows == pattern).all(axis=(2, 3, 4)))


def test_sheet_shows_every_pixel_enlarged_in_its_row_and_column(tmp_path):
    rng = np.random.default_rng(1)
    grey, colour = rng.integers(0, 256, (3, 2, 2, 1)), rng.integers(0, 256, (2, 2, 2, 3))
    rows = [("teacher, 1 call", grey / 255), ("student, 1 step", colour / 255)]
    save_sample_sheet(tmp_path / "new" / "sheet.png", rows, scale=5, headings=["0", "1", "2"], title="Digits")
    picture = read(tmp_path / "new" / "sheet.png")
    found = [[blocks(picture, np.broadcast_to(x, (2, 2, 3)), 5) for x in row] for row in (grey, colour)]
    assert all(len(corners) == 1 for row in found for corners in row)
    tops = [[corners[0][0] for corners in row] for row in found]
    lefts = [[corners[0][1] for corners in row] for row in found]
    assert len(set(tops[0])) == len(set(tops[1])) == 1 and tops[1][0] >= tops[0][0] + 10
    assert lefts[1] == lefts[0][:2] and lefts[0] == sorted(lefts[0])
    label = picture[tops[0][0] : tops[0][0] + 10, : lefts[0][0] - 4]
    assert label.min() < 100 and (picture[:, :4] == 255).all()  # ink of the label, clear of the margin


def test_sheet_is_wide_enough_for_its_words(tmp_path):
    image = np.zeros((1, 2, 2, 1))
    save_sample_sheet(tmp_path / "a.png", [("a rather long name of a sampler", image)], scale=4, title="A title " * 8)
    picture = read(tmp_path / "a.png")
    assert (picture[:, -4:] == 255).all() and (picture[-4:] == 255).all()


def test_sheets_that_cannot_be_drawn(tmp_path):
    image = np.zeros((2, 8, 8, 1))
    for rows, options, words in (
        ([], {}, "No rows"),
        ([("a", image), ("b", np.zeros((2, 4, 8, 1)))], {}, "different sizes.*'b'"),
        ([("a", image)], {"scale": 0}, "scale is 0"),
        ([("a", image)], {"headings": ["0", "1", "2"]}, "3 headings for 2 columns"),
    ):
        with pytest.raises(ValueError, match=words):
            save_sample_sheet(tmp_path / "a.png", rows, **options)


def test_running_mean_keeps_straight_lines_and_skips_nan():
    line = np.arange(20.0)
    assert np.allclose(_running_mean(line, 5)[2:-2], line[2:-2])
    assert _running_mean(line, 5)[0] == pytest.approx(1) and _running_mean(line, 5)[-1] == pytest.approx(18)
    assert np.array_equal(_running_mean(line, 1), line)
    gap = line.copy()
    gap[10] = np.nan
    assert _running_mean(gap, 3)[10] == pytest.approx(10) and np.isnan(_running_mean(gap, 1)[10])


@pytest.mark.parametrize("values", [[3.0, 2, 1], [1.0, -1, 0], [np.nan, np.inf, 2], [np.nan] * 3, [2.0] * 3])
def test_loss_plot_takes_what_training_gives(tmp_path, values):
    save_loss_plot(tmp_path / "loss.png", {"student": ([0, 10, 20], values), "fake": ([0], [0.5])})
    picture = read(tmp_path / "loss.png")
    assert picture.shape == (630, 1200, 3) and picture.std() > 10
    assert (picture[:, :3] == 255).all() and (picture[:, -3:] == 255).all()  # nothing is cut off


def test_loss_plots_that_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="No series"):
        save_loss_plot(tmp_path / "a.png", {})
    with pytest.raises(ValueError, match="'student' has 2 steps and 3 values"):
        save_loss_plot(tmp_path / "a.png", {"student": ([0, 1], [1, 2, 3])})


def test_scatter_draws_points_and_centres(tmp_path):
    rng = np.random.default_rng(2)
    wild = np.array([[np.nan, 0], [np.inf, 1], [1e9, 1]])
    panels = [("exact", rng.standard_normal((200, 2))), ("student", wild), ("none", np.zeros((0, 2)))]
    save_scatter(tmp_path / "a.png", panels)
    save_scatter(tmp_path / "b.png", panels, centres=[[0.0, 0], [1, 1]])
    save_scatter(tmp_path / "c.png", [("student", wild[:1])])
    without, with_centres = read(tmp_path / "a.png"), read(tmp_path / "b.png")

    def orange(picture):
        red, green, blue = np.moveaxis(picture.astype(int), 2, 0)
        return ((red > 180) & (green < 130) & (blue < 60)).sum()

    assert orange(without) == 0 and orange(with_centres) > 50
    with pytest.raises(ValueError, match=r"panel 'exact' have shape \(4, 3\)"):
        save_scatter(tmp_path / "a.png", [("exact", np.ones((4, 3)))])
    with pytest.raises(ValueError, match="No panels"):
        save_scatter(tmp_path / "a.png", [])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "picture.png"
    for save, content in (
        (save_sample_sheet, [("a", np.zeros((1, 8, 8, 1)))]),
        (save_loss_plot, {"a": ([0, 1], [1, 2])}),
        (save_scatter, [("a", np.ones((3, 2)))]),
    ):
        with pytest.raises(OSError, match=f"Cannot write the picture {path}: .*you may write to"):
            save(path, content)
        with pytest.raises(OSError, match="irectory"):
            save(tmp_path, content)
