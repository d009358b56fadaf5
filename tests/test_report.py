"""The page of a report as data: what is embedded, what is compared, what the command reads and writes."""

import base64
import io
import json
import os
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from report_pages import page

from ddistill.cli import main
from ddistill.cli.report import _told_apart, read_rows
from ddistill.cli.report_runs import find, groups_of
from ddistill.cli.rows import fingerprint
from ddistill.evaluate.samplers import start, student_sampler
from ddistill.integrators import heun
from ddistill.mixture import Mixture, as_teacher
from ddistill.overrides import describe
from ddistill.process import edm
from ddistill.report import embed
from ddistill.report.charts import charts
from ddistill.report.html import embedded, render
from ddistill.report.measures import MEASURES, columns_of, table
from ddistill.report.motion import motion, student_path, teacher_path
from ddistill.report.page import Column, Drawn, Group, Line, Page, Run, Sheet, Table, best, differing, written
from ddistill.runs import load_experiment, open_run
from ddistill.sample import sample

pytest.importorskip("jinja2", reason="jinja2 is not installed")
vl_convert = pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")


def image_of(address):
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_holds_every_pixel_and_clear_gaps(channels):
    x = np.random.default_rng(0).random((5, 8, 8, channels))
    sheet = embed.picture(x)
    pixels = np.asarray(image_of(sheet["src"]))
    assert (sheet["columns"], sheet["rows"], sheet["n"], sheet["pixelated"]) == (3, 2, 5, True)
    assert pixels.shape == (17, 26, channels + 1) and (sheet["width"], sheet["height"]) == (26, 17)
    for i in range(5):
        y, left = 9 * (i // 3), 9 * (i % 3)
        np.testing.assert_array_equal(pixels[y : y + 8, left : left + 8, :channels], np.rint(255 * x[i]))
    assert (pixels[8, :, -1] == 0).all() and (pixels[9:, 18:, -1] == 0).all()  # the gap, and the sixth place


def test_large_images_are_shrunk_and_packed():
    x = np.zeros((2, 320, 640, 3)) + np.linspace(0, 1, 640)[:, None]
    sheet = embed.picture(x)
    assert sheet["src"].startswith("data:image/webp") and not sheet["pixelated"]
    assert image_of(sheet["src"]).size == (160 + 7 + 160, 80)
    pixels = np.asarray(image_of(sheet["src"]).convert("RGB")).astype(float)[:, :160] / 255
    np.testing.assert_allclose(pixels.mean((0, 2)), np.linspace(0, 1, 160), atol=0.03)


def test_points_lie_on_a_grid_of_the_frame_and_what_is_far_off_is_marked():
    frame = (0.5, -0.25, 1.5)
    x = np.random.default_rng(0).uniform(-2, 2, (200, 2))
    x[0], x[1], x[2] = [np.nan, 0], [5.1, 0], [0.5, -0.25 - 4.6]
    whole = np.frombuffer(base64.b64decode(embed.points(x, frame)), "<i2").reshape(-1, 2)
    assert (whole[:3] == -32768).all() and (whole[3:] != -32768).all()
    back = whole[3:] / 32767 * 3 * 1.5 + [0.5, -0.25]
    np.testing.assert_allclose(back, x[3:], atol=0.5 / 32767 * 3 * 1.5 + 1e-12)


def test_the_frame_is_of_the_first_sheet_and_the_centres_and_counts_what_lies_outside():
    truth = np.array([[-1.0, 0.0], [1.0, 0.0]])
    stray = np.array([[0.0, 0.0], [9.0, 0.0], [np.nan, 0.0]])
    group = Group("g", (), [Drawn("exact", "reference", {0: Sheet(truth)}), Drawn("s", "student", {1: Sheet(stray)})])
    x, y, half = embed.frame(group)
    assert (x, y) == pytest.approx((0, 0)) and half == pytest.approx(1.12, rel=0.01)
    assert embed.drawn(group.drawn[1], (x, y, half), 36)["steps"]["1"]["outside"] == 2
    wider = Group("g", (), group.drawn, centres=np.array([[3.0, 0.0]]))
    assert embed.frame(wider)[0] == pytest.approx(1, abs=0.01)
    assert embed.frame(Group("no points")) is None


def test_a_curve_keeps_the_means_of_its_stretches():
    y = np.random.default_rng(0).random(1000)
    y[10] = np.nan
    thin = embed.curve(range(1000), y, most=100)
    assert thin["x"] == list(range(9, 1000, 10))
    expected = [np.nanmean(y[i : i + 10]) for i in range(0, 1000, 10)]
    np.testing.assert_allclose(thin["y"], expected, rtol=5e-4)
    assert embed.curve([], [])["x"] == [] and embed.curve([1, 2], [np.inf, 3.0]) == {"x": [2.0], "y": [3.0]}


def test_the_best_of_the_students_is_known_by_each_columns_better_side():
    columns = [Column("up", "up", better=1), Column("down", "down", better=-1), Column("none", "none")]
    lines = [
        Line("teacher", "teacher", 35, {"up": 9.0, "down": 0.0, "none": 1.0}),
        Line("a", "student", 1, {"up": 1.0, "down": 2.0, "none": 5.0}),
        Line("b", "student", 1, {"up": 3.0, "down": float("nan"), "none": None}),
        Line("c", "student", 1, {"up": 2.0, "down": 4.0}),
    ]
    assert best(Table("", columns, lines)) == {"up": 3.0, "down": 2.0}


def test_differences_are_the_fields_that_differ_and_parts_of_other_types_as_a_whole():
    def run(name, steps, method):
        return Run(
            name, config={"type": "E", "name": name, "steps": steps, "data": {"type": "D", "k": 1}, "method": method}
        )

    same = {"type": "m.KD", "pairs": 5, "solver": "ddistill.integrators.single_step.heun"}
    names, rows, common = differing([run("a", 1, same), run("b", 2, {**same, "pairs": 6})])
    assert (names, rows) == (["steps", "method.pairs"], [["1", "5"], ["2", "6"]])
    assert common == {"data.k": "1", "method.solver": "heun"}
    names, rows, _ = differing([run("a", 1, same), run("b", 1, {"type": "m.CTM", "gap": [0.1, 2]})])
    assert names == ["method"] and rows[0] == ["KD(pairs=5, solver=heun)"] and rows[1] == ["CTM(gap=(0.1, 2))"]
    assert differing([])[0] == [] and differing([Run("x"), run("a", 1, same)])[1][0] == []
    assert written({"type": "a.B", "x": None, "y": True}) == "B(x=–, y=True)"


class Reader(HTMLParser):
    """What a page refers to, and the text outside of scripts and styles."""

    def __init__(self):
        super().__init__()
        self.links, self.text, self.tags, self._in = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self._in = tag if tag in ("script", "style") else self._in

    def handle_endtag(self, tag):
        self._in = "" if tag == self._in else self._in

    def handle_data(self, text):
        if not self._in:
            self.text.append(text)


def read(text):
    reader = Reader()
    reader.feed(text)
    return reader


def test_a_page_refers_to_nothing_outside_and_names_are_text():
    evil = "</script><script>alert(1)</script>"
    made = page(2)
    runs = [Run(evil, {"k": evil}, [evil], curves={evil: ([1], [1.0])}), *made.runs]
    text, _ = render(Page(evil, made.groups, runs, {evil: evil}, evil, evil))
    reader = read(text)
    assert reader.links and all(link.startswith("#") for link in reader.links)
    assert reader.tags.count("script") == 3  # the data, Vega and our own: none came with a name
    assert "".join(reader.text).count(evil) >= 6
    begin = text.index('id="data">') + len('id="data">')
    data = json.loads(text[begin : text.index("</script>", begin)])
    assert data["students"] == [evil, "run000", "run001"] and data["curves"][evil] == {evil: {"x": [1.0], "y": [1.0]}}


def test_samples_are_bounded_and_the_page_says_so():
    whole, said = embedded(page(4, samples=36), 36, 24)
    size = embed.size(whole["groups"])
    assert "at most 36 images" in said and "left out" not in said and f"{size / 1e6:.1f} MB" in said
    fewer, said = embedded(page(4, samples=36), 36, 0.6 * size / 1e6)
    assert embed.size(fewer["groups"]) <= 0.6 * size and "asked for 36" in said
    assert fewer["groups"][0]["drawn"][0]["steps"]["35"]["n"] < 36
    none, said = embedded(page(4, samples=36), 36, 0.001)
    assert re.search(r"the samples of \d+ samplers are left out", said)
    assert len(none["groups"][0]["drawn"]) == 1


@pytest.mark.parametrize("name", ["cost", "trade", "loss"])
def test_plots_draw_a_mark_for_every_point(name):
    rng = np.random.default_rng(0)
    points = [
        {"x": float(x), "y": float(y), "y0": y - 0.1, "y1": y + 0.1, "x0": x - 0.1, "x1": x + 0.1,
         "name": run, "order": i, "text": f"{run} {i}", "colour": "#123456", "shape": "square", "dash": [1, 0],
         "opacity": 1}
        for run in ("a", "b") for i, (x, y) in enumerate(rng.uniform(1, 2, (3, 2)))
    ]  # fmt: skip
    spec = charts()[name]
    spec["data"]["values"] = points
    spec["width"] = 400
    spec["layer"] = [{k: v for k, v in layer.items() if k != "needs"} for layer in spec["layer"]]
    svg = vl_convert.vegalite_to_svg(spec)
    assert svg.count('fill="#123456"') == (0 if name == "loss" else 6)
    lines = re.findall(r'<path[^>]*stroke="#123456"[^>]*>', svg)
    assert len([line for line in lines if line.count("L") >= 2]) == 2
    assert len(re.findall(r'<line[^>]*stroke="#123456"', svg)) == {"cost": 6, "trade": 12, "loss": 0}[name]
    assert 'fill="var(--soft)"' in svg


def test_rows_of_an_evaluation_become_columns_in_a_fixed_order_and_teachers_are_told_once():
    rows = [
        (
            "a",
            {
                "sampler": "student",
                "nfe": 1,
                "recall": 0.5,
                "fid": 3.0,
                "fid_std": 0.5,
                "odd_one": 2,
                "seed": 4,
                "flag": True,
            },
        ),
        (None, {"sampler": "teacher, Heun", "nfe": 35, "recall": 0.9, "fid": float("nan")}),
        (None, {"sampler": "teacher, Heun", "nfe": 35, "recall": 0.1}),
        (None, {"sampler": "held-out", "nfe": None, "recall": 1.0}),
    ]
    made = table(rows)
    assert [c.name for c in made.columns] == ["fid", "recall", "odd_one"] and made.columns[2].title == "odd one"
    assert [(line.label, line.kind) for line in made.lines] == [
        ("held-out", "reference"), ("teacher, Heun", "teacher"), ("a", "student"),
    ]  # fmt: skip
    assert [line.values for line in made.lines] == [
        {"recall": 1.0},
        {"recall": 0.9},
        {"recall": 0.5, "fid": 3.0, "odd_one": 2.0},
    ]
    assert made.lines[2].spread == {"fid": 0.5}
    assert columns_of([]) == [] and next(iter(MEASURES)) == "fid"


def test_paths_of_gaussian_data_stand_still_in_the_page_and_end_where_samples_do():
    # For N(0, c²) the flow is x_t ∝ √(α² c² + σ²): over its spread every path is one point.
    process, c = edm(), 0.5
    teacher = as_teacher(Mixture.from_covariances([1.0], [[0.0, 0.0]], [c**2 * np.eye(2)]), process)
    noise = process.prior(jax.random.key(0), (20, 2))
    grid = jnp.asarray([80.0, 20.0, 5.0, 1.5, 0.6, 0.3, 0.15, 0.05, 0.0])
    states = teacher_path(teacher.bind(), process, grid, noise)
    assert len(states) == len(grid)
    np.testing.assert_allclose(states[-1], heun(teacher.bind(), process, grid, noise).x, rtol=1e-5, atol=1e-6)
    fine = jnp.asarray(np.geomspace(80, 0.002, 300))
    moving = motion("m", "teacher", process, fine, teacher_path(teacher.bind(), process, fine, noise), c)
    np.testing.assert_allclose(moving.x, np.broadcast_to(moving.x[:1], moving.x.shape), atol=0.01)
    np.testing.assert_allclose(moving.noise, np.asarray(fine) / (np.asarray(fine) + c), rtol=1e-5)
    times = np.array([80.0, 4.0, 0.5, 0.0])
    path = student_path(teacher, process, times, noise, jax.random.key(1))
    np.testing.assert_allclose(path[-1], sample(teacher, process, times, noise).x, rtol=1e-5, atol=1e-6)


EXPERIMENT = Path(__file__).parents[1] / "experiments" / "digits_consistency.py"
TINY = ["--network.width", "16", "--network.blocks", "1", "--teacher.steps", "2", "--steps", "2", "--batch-size", "8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_device):
    """Two finished runs, a copy of one that is unfinished, one whose record is damaged, and a folder that is no run."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["distill", str(EXPERIMENT), "--workdir", str(folder / "a"), *TINY]) == 0
    for name, text in (("c", None), ("d", "{")):
        (folder / name).mkdir()
        for file in ("experiment.json", "experiment.py"):
            (folder / name / file).write_text(text or (folder / "a" / file).read_text("utf-8"), encoding="utf-8")
    (folder / "nothing").mkdir()
    rows = [
        {"sampler": "held-out scans (floor)", "nfe": None, "frechet": 1.0, "recall": 0.97},
        {"sampler": "student", "nfe": 1, "frechet": 2.5, "recall": 0.5},
    ]
    (folder / "a" / "evaluate.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    flags = ["--features", "inception=a.pth", "--metrics", "fid"]
    (folder / "a" / "evaluation").mkdir()
    (folder / "a" / "evaluation" / "table.json").write_text(json.dumps({"flags": flags, "rows": rows[:1]}))
    return folder


@pytest.fixture(scope="module")
def written_page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    given = [str(runs), str(runs / "nothing"), str(runs / "missing")]
    assert main(["report", *given, "--out", str(out), "--steps", "1", "2", "--samples", "4"]) == 0
    text = (out / "index.html").read_text(encoding="utf-8")
    begin = text.index('id="data">') + len('id="data">')
    return text, json.loads(text[begin : text.index("</script>", begin)])


def test_the_command_shows_what_it_can_and_says_why_it_cannot_show_the_rest(written_page, runs):
    words = " ".join("".join(read(written_page[0]).text).split())
    assert "is unfinished" in words and f"{runs / 'c'}" in words
    assert f"{runs / 'd'} its experiment.json or metrics cannot be read" in words
    assert f"{runs / 'nothing'} is no run and holds none" in words and f"{runs / 'missing'} does not exist" in words
    assert "2 runs of 1 teacher, sampled from the same noise." in words
    data = written_page[1]
    assert data["students"] == ["a", "c"]
    assert {line["label"]: line["values"] for line in data["groups"][0]["lines"]} == {
        "held-out scans (floor)": {"frechet": 1.0, "recall": 0.97}, "a": {"frechet": 2.5, "recall": 0.5},
    }  # fmt: skip
    assert set(data["curves"]["a"]) >= {"teacher: student/loss", "distillation: student/loss"}
    for line in ("\n", " --features inception=a.pth --metrics fid"):
        assert f"ddistill evaluate {runs / 'a'}-again{line}" in written_page[0]
    assert f"ddistill evaluate {runs / 'c'}-again" not in written_page[0]


def test_evaluations_of_each_kind_have_a_table_and_those_of_an_earlier_training_none(runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "experiment.json").write_text((runs / "a" / "experiment.json").read_text("utf-8"), "utf-8")

    def write(name, run, row, **made):
        made = {"run": run, **made}
        value = {"made": made, "rows": [{"sampler": "student", "nfe": 1, "seed": 3, **row}]}
        (folder / name).write_text(json.dumps(value), encoding="utf-8")

    now = fingerprint(folder)
    write("pixels.json", now, {"accuracy": 0.9, "samples": 2000}, of="digits, by pixels")
    write("fid.json", now, {"fid": 40.0, "samples": 200, "notes": ["200 samples, fewer"]}, metrics=["fid"])
    write("kid.json", "another", {"kid": 1.0}, metrics=["kid"])
    (group,) = groups_of(find([folder])[0], {})
    assert [table.title for table in group.tables] == ["by networks' features", "digits, by pixels"]
    assert [dict(table.lines[0].values) for table in group.tables] == [
        {"fid": 40.0, "samples": 200}, {"accuracy": 0.9, "samples": 2000},
    ]  # fmt: skip
    assert [table.words for table in group.tables] == ["Samples of seed 3; 200 samples, fewer", "Samples of seed 3"]
    assert group.words == f"Of an earlier training, and left out: {folder / 'kid.json'}."
    write("fid.json", now, {"fid": 30.0}, metrics=["fid"])
    (group,) = groups_of(find([folder])[0], {})
    assert group.tables[0].lines[0].values == {"fid": 30.0}


def test_numbers_that_do_not_compare_stand_in_tables_of_their_own(runs, tmp_path):
    record = (runs / "a" / "experiment.json").read_text("utf-8")
    for name in "xy":
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment.json").write_text(record, "utf-8")

    def write(file, fid, date=None, *, row=None, **made):
        network = {"name": "inception-v3", "digest": "0123456789abcdef", "preprocessing": "clean, 299 pixels"}
        made = {"networks": {"inception": network}, "reference": None, "samples": 200, "seed": 0, **made}
        made |= {"run": fingerprint(file.parent), "metrics": ["fid"], "batch_size": 64}
        rows = [
            {"sampler": "teacher, Heun", "nfe": 35, "fid": fid / 2},
            {"sampler": "student", "nfe": 1, **({"fid": fid} if row is None else row)},
        ]
        file.write_text(json.dumps({"made": made, "rows": rows} | ({"date": date} if date else {})), "utf-8")

    def shown(*folders):
        (group,) = groups_of(find(folders)[0], {})
        return {table.title: [(line.label, dict(line.values)) for line in table.lines] for table in group.tables}

    x, y = tmp_path / "x", tmp_path / "y"
    write(x / "a.json", 40.0)
    write(y / "a.json", 30.0)
    # Judged alike, runs share a table, and their one teacher a line.
    alike = [("teacher, Heun", {"fid": 20.0}), ("x", {"fid": 40.0}), ("y", {"fid": 30.0})]
    assert shown(x, y) == {"": alike}
    write(y / "b.json", 35.0, samples=100)
    write(y / "c.json", 33.0, reference=["photos", "fedcba9876543210"])
    title = "by networks' features: reference {}; samples {}"
    assert shown(x, y) == {
        title.format("the run's data", 200): alike,
        title.format("the run's data", 100): [("teacher, Heun", {"fid": 17.5}), ("y", {"fid": 35.0})],
        title.format("photos, fedcba98", 200): [("teacher, Heun", {"fid": 16.5}), ("y", {"fid": 33.0})],
    }
    # What was written last is told by the file, since times of files change when they are copied; of another metric
    # the number stays.
    write(x / "a.json", 41.0, "2026-02-03T00:00:00+00:00")
    write(x / "b.json", 42.0, "2026-02-02T00:00:00+00:00", row={"fid": 43.0, "kid": 0.5})
    os.utime(x / "a.json", (1, 1))
    assert shown(x)[""][-1] == ("x", {"fid": 41.0, "kid": 0.5})


def test_the_samples_of_a_page_are_the_runs_samples_from_one_noise(written_page, runs):
    drawn = {one["label"]: one["steps"] for one in written_page[1]["groups"][0]["drawn"]}
    assert list(drawn) == ["data", "teacher, Heun", "teacher, DPM-Solver++(2M)", "a"]
    assert list(drawn["teacher, Heun"]) == ["35"] and list(drawn["a"]) == ["1", "2"]
    opened = open_run(runs / "a")
    process = opened.experiment.process
    noise, labels, key = start(process, (8, 8, 1), 10, 4, 0)
    x = student_sampler(opened.student, opened.experiment.method(process), process, 2).draw(noise, labels, key).x
    pixels = np.asarray(image_of(drawn["a"]["2"]["src"]))
    expected = np.rint(255 * opened.data.to_unit(np.asarray(x)))
    for i, (y, left) in enumerate(((0, 0), (0, 9), (9, 0), (9, 9))):
        np.testing.assert_array_equal(pixels[y : y + 8, left : left + 8, 0], expected[i, ..., 0])


def test_the_commands_of_a_page_repeat_its_runs(written_page, runs):
    (line,) = re.findall(rf"^ *.*(ddistill distill {re.escape(str(runs / 'a'))}/.*?)$", written_page[0], re.MULTILINE)
    words = shlex.split(re.sub(r"<.*", "", line).replace("&#39;", "'"))
    again = load_experiment(words[2], words[3 : words.index("--workdir")])
    assert describe(again) == json.loads((runs / "a" / "experiment.json").read_text("utf-8"))["experiment"]


def test_groups_with_one_title_are_numbered():
    titles = [group.title for group in _told_apart([Group(name) for name in ("digits", "ring8", "digits", "digits")])]
    assert titles == ["digits", "ring8", "digits 2", "digits 3"]


def test_runs_with_one_name_are_told_apart_by_their_folders(runs, tmp_path):
    for name in ("x/run", "y/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "experiment.json").write_text((runs / "a" / "experiment.json").read_text("utf-8"), "utf-8")
    found, failed = find([tmp_path / "x" / "run", tmp_path / "y"])
    assert [run.name for run in found] == ["x/run", "y/run"] and not failed
    assert found[0].teacher == found[1].teacher


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "does not exist"), ("{", "is not JSON"), ("[]", "has no rows"), ('{"rows": []}', "has no rows"),
     ('{"rows": [{"a": 1}]}', "neither of a benchmark")],
)  # fmt: skip
def test_files_that_hold_no_rows_are_refused_in_words(text, words, tmp_path, capsys):
    path = tmp_path / "rows.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_rows_of_compare_are_a_table_with_plots(tmp_path):
    rows = Path(__file__).parents[1] / "experiments" / "results" / "digits.json"
    assert main(["report", str(rows), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert text.count('data-kind="student"') == sum(r["train_s"] is not None for r in read_rows(rows))
    assert 'data-plot="cost"' in text and 'id="commands"' not in text
