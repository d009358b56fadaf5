"""The page of a report in headless Chromium: what a reader sees and does, with mouse, keyboard and on a phone."""

import base64
import dataclasses
import io
import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_pages import COLUMNS, STEPS, page

from ddistill.cli import main
from ddistill.report.html import write_page

pytest.importorskip("selenium", reason="selenium is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402


class Browser:
    """Chromium with one page open, at a width and with media features of our choosing."""

    def __init__(self, profile):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        for flag in (*flags, f"--user-data-dir={profile}", "--disable-background-networking"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, path, width=1280, height=900, **media):
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.tell("Emulation.setEmulatedMedia", features=features)
        self.driver.get(path.as_uri())
        self.wait("document.documentElement.dataset.ready === 'true'")

    def tell(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.05)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent.trim())", selector
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "index.html"
    write_page(path, page(), samples=9)
    return path


@pytest.fixture(scope="module")
def data(report):
    text = report.read_text(encoding="utf-8")
    begin = text.index('<script type="application/json" id="data">') + len('<script type="application/json" id="data">')
    return json.loads(text[begin : text.index("</script>", begin)])


def plots_drawn(browser, count):
    browser.run("document.querySelectorAll('.plot').forEach((f) => f.scrollIntoView())")
    for i in range(count):
        browser.run("document.querySelectorAll('.plot')[arguments[0]].scrollIntoView()", i)
        browser.wait(f"document.querySelectorAll('.plot')[{i}].querySelector('svg')")


def test_a_page_from_disk_asks_for_nothing_and_complains_of_nothing(browser, report):
    browser.driver.get_log("performance"), browser.driver.get_log("browser")
    browser.open(report)
    plots_drawn(browser, 3)
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    requests = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # Chromium itself may ask for pages of its own while it starts.
    asked = {r["request"]["url"] for r in requests if r["documentURL"] == report.as_uri()}
    assert {url for url in asked if not url.startswith("data:")} == {report.as_uri()}
    assert browser.driver.get_log("browser") == []
    assert browser.run("return document.querySelectorAll('main h2').length") >= 5


def test_the_policy_of_the_page_forbids_requests(browser, report):
    # What a script could ask for by mistake is stopped by the browser, whatever the script.
    browser.open(report)
    done = browser.driver.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective));"
        "fetch('http://127.0.0.1:9/').then(() => done('went out'), () => {});"
    )
    assert done == "connect-src"


def test_the_slider_changes_the_picture(browser, report, data):
    browser.open(report)
    image, slider = (browser.one(f"#group-0 {s}") for s in (".left img", ".steps"))
    sheets = next(d for d in data["groups"][0]["drawn"] if d["label"] == "run000")["steps"]
    assert image.get_attribute("src") == sheets["1"]["src"] and "1 network call" in image.get_attribute("alt")
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)  # a slider is worked by its keys
    assert image.get_attribute("src") == sheets["4"]["src"] and "4 network calls" in image.get_attribute("alt")
    assert slider.get_attribute("aria-valuetext") == "4 network calls"
    # The pixels are those of the run's samples: nine of 8x8 with a gap of one.
    expected = np.rint(255 * np.asarray(page().groups[0].drawn[1].sheets[4].x)).astype(np.uint8)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.get_attribute("src").partition(",")[2]))))
    assert pixels.shape == (26, 26, 2)
    np.testing.assert_array_equal(pixels[9:17, 18:26, 0], expected[5].squeeze(2))
    assert (pixels[8, :, 1] == 0).all()


def test_keys_switch_between_runs_and_the_teacher_in_place(browser, report, data):
    browser.open(report)
    chosen = browser.one("#group-0 .switch input:checked")
    image = browser.one("#group-0 .left img")
    before = image.get_attribute("src")
    chosen.send_keys(Keys.ARROW_RIGHT)
    drawn = {d["label"]: d["steps"] for d in data["groups"][0]["drawn"]}
    assert image.get_attribute("src") == drawn["run001"]["1"]["src"] != before
    browser.one("#group-0 .switch input:checked").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert image.get_attribute("src") == drawn["teacher, Heun"]["35"]["src"]
    right = browser.one("#group-0 .right img").get_attribute("src")
    assert right == drawn["teacher, Heun"]["35"]["src"]  # what students are compared with, unless told otherwise


def test_tables_sort_by_click_and_by_key(browser, report):
    browser.open(report)
    heads = browser.driver.find_elements(By.CSS_SELECTOR, "#group-0 thead th")
    column = next(i for i, head in enumerate(heads) if head.text.startswith("Fréchet"))

    def values(i):
        cells = browser.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.dataset.value)",
                            f"#group-0 tbody tr > :nth-child({i + 1})")  # fmt: skip
        return [float(c) if c else None for c in cells]

    before = values(column)
    heads[column].find_element(By.TAG_NAME, "button").click()
    assert values(column) == sorted(before) != before and heads[column].get_attribute("aria-sort") == "ascending"
    heads[column].find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert values(column) == sorted(before, reverse=True) and heads[column].get_attribute("aria-sort") == "descending"
    recall = next(i for i, head in enumerate(heads) if head.text.startswith("recall"))
    heads[recall].find_element(By.TAG_NAME, "button").click()
    assert heads[column].get_attribute("aria-sort") == "none"
    for _ in range(2):  # what is missing stays last, up and down
        assert values(recall)[-1] is None and None not in values(recall)[:-1]
        heads[recall].find_element(By.TAG_NAME, "button").click()
    assert browser.texts("#live")[0].startswith("Sorted by recall")


def test_numbers_of_the_configuration_sort_as_numbers(browser, tmp_path):
    path = tmp_path / "index.html"
    write_page(path, page(4))
    browser.open(path)
    heads = browser.driver.find_elements(By.CSS_SELECTOR, "#configuration thead th")
    column = next(i for i, head in enumerate(heads) if head.text == "rate")
    for expected in (["-0.25", "1e-05", "0.5"], ["0.5", "1e-05", "-0.25"]):
        browser.run("arguments[0].click()", heads[column].find_element(By.TAG_NAME, "button"))
        assert browser.texts(f"#configuration tbody tr > :nth-child({column + 1})")[:3] == expected


def test_a_bar_that_reaches_below_zero_leaves_a_logarithmic_plot_whole(browser, tmp_path):
    made = page()
    lines = [dataclasses.replace(line, spread={}) for line in made.groups[0].tables[0].lines]
    measured = [i for i, line in enumerate(lines) if line.kind == "student"]
    for i, value in zip(measured, (1e-4, 4e-3, 5e-2), strict=False):
        values = {**lines[i].values, "frechet": value}
        lines[i] = dataclasses.replace(lines[i], values=values, spread={"frechet": 3 * value})
    group = dataclasses.replace(made.groups[0], tables=[dataclasses.replace(made.groups[0].tables[0], lines=lines)])
    path = tmp_path / "index.html"
    write_page(path, dataclasses.replace(made, groups=[group]))
    browser.open(path)
    plots_drawn(browser, 2)
    marks, rules = (f"#group-0 [data-plot=cost] {mark}" for mark in (".mark-symbol path", ".mark-rule.role-mark line"))
    read = "return [...document.querySelectorAll(arguments[0])].map((e) => e.getAttribute(arguments[1]))"
    places, ends = browser.run(read, marks, "transform"), browser.run(read, rules, "y2")
    assert len(set(places)) == len(places) > 3 and len(ends) == 3
    assert "NaN" not in "".join([*places, *(end or "" for end in ends)])


def luminance(browser):
    colour = browser.run("return getComputedStyle(document.body).backgroundColor")
    return sum(map(float, colour[colour.index("(") + 1 : -1].split(",")[:3])) / 3 / 255


def test_light_and_dark_follow_the_system_and_the_switch(browser, report):
    browser.open(report, prefers_color_scheme="light")
    assert luminance(browser) > 0.9
    browser.open(report, prefers_color_scheme="dark")
    assert luminance(browser) < 0.15
    browser.run("document.querySelector('input[name=theme][value=light]').click()")
    assert luminance(browser) > 0.9
    browser.open(report, prefers_color_scheme="dark")
    assert luminance(browser) > 0.9  # the choice is kept
    browser.run("document.querySelector('input[name=theme][value=auto]').click()")
    assert luminance(browser) < 0.15


def contrast(a, b):
    def light(colour):
        parts = [float(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(browser, report, scheme):
    # WCAG 2.1: 4.5 for text, 3 for what is not text, such as lines of a plot.
    browser.open(report, prefers_color_scheme=scheme)
    names = ["--page", "--raised", "--ink", "--soft", "--accent", "--lost", *(f"--c{i}" for i in range(7))]
    colour = {name: browser.run("return colourOf(document.body, arguments[0])", name) for name in names}
    for background in ("--page", "--raised"):
        for name in names[2:]:
            least = 3 if name.startswith("--c") else 4.5
            assert contrast(colour[name], colour[background]) >= least, (name, background)


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_a_phone(browser, report, width):
    browser.open(report, width=width, height=740)
    plots_drawn(browser, 3)
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_plots_have_a_point_and_bars_for_every_number_and_follow_the_choice(browser, report):
    browser.open(report)
    plots_drawn(browser, 3)
    lines = page().groups[0].tables[0].lines
    points = "#group-0 [data-plot=cost] .mark-symbol path"
    assert len(browser.texts(points)) == sum(line.nfe is not None for line in lines)
    bars = "#group-0 [data-plot=cost] .mark-rule.role-mark line"
    assert len(browser.texts(bars)) == sum(line.kind == "student" for line in lines)
    said = browser.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.ariaLabel)", points)
    assert "run000, 2 network calls: Fréchet 0.6 ± 0.05" in said
    assert browser.run("return document.querySelectorAll('#training .mark-line path').length") == 3
    browser.run("document.querySelectorAll('#chips input')[1].click()")
    browser.wait("document.querySelectorAll('#training .mark-line path').length === 2")
    select = browser.one("#group-0 [data-plot=cost] select")
    assert [o.text for o in select.find_elements(By.TAG_NAME, "option")] == [c.title for c in COLUMNS]


def reds(browser, selector):
    """How many pixels of a canvas are red."""
    address = browser.run("return document.querySelector(arguments[0]).toDataURL()", selector)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGBA")).astype(int)
    return int(((pixels[..., 3] > 200) & (pixels[..., 0] > 150) & (pixels[..., 1] < 80) & (pixels[..., 2] < 90)).sum())


def test_lost_modes_are_red_and_said(browser, report):
    browser.open(report, prefers_color_scheme="light")
    browser.run("document.querySelector('#group-1 .viewer').scrollIntoView()")
    browser.wait("document.querySelector('#group-1 .viewer .left canvas')?.width > 100")
    assert reds(browser, "#group-1 .viewer .left canvas") > 50
    assert reds(browser, "#group-1 .viewer .right canvas") == 0
    assert "2 of 8 modes lost" in browser.one("#group-1 .viewer .left canvas").get_attribute("aria-label")
    assert "2 of 8 modes lost" in browser.one("#group-1 .viewer .left figcaption").text
    browser.one("#group-1 .steps").send_keys(Keys.ARROW_RIGHT)
    assert reds(browser, "#group-1 .viewer .left canvas") == 0


def test_paths_play_and_pause_and_readers_who_ask_for_calm_get_single_pictures(browser, report):
    browser.open(report, prefers_reduced_motion="no-preference")
    play, slider = browser.one("#group-1 .play"), browser.one("#group-1 .time")
    browser.run("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", play)
    picture = "return document.querySelector('#group-1 .motion .left canvas').toDataURL()"
    browser.wait("document.querySelector('#group-1 .motion .left canvas').width > 100")
    before = browser.run(picture)
    assert slider.get_attribute("value") == "0" and play.text == "Play"  # nothing moves by itself
    play.send_keys(Keys.SPACE)
    assert play.get_attribute("aria-pressed") == "true" and play.text == "Pause"
    browser.wait("document.querySelector('#group-1 .time').value > 20")
    browser.run("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", play)
    play.click()
    at = slider.get_attribute("value")
    assert browser.run(picture) != before and play.text == "Play"
    time.sleep(0.1)
    assert slider.get_attribute("value") == at
    slider.send_keys(Keys.END)
    assert slider.get_attribute("aria-valuetext") == "0 percent noise"
    browser.open(report, prefers_reduced_motion="reduce")
    browser.run("document.querySelector('#group-1 .play').click()")
    browser.wait("document.querySelector('#group-1 .time').value > 0")
    assert int(browser.one("#group-1 .time").get_attribute("value")) % 125 == 0


def test_all_that_can_be_worked_has_a_name_and_pictures_have_words(browser, report):
    browser.open(report)
    nodes = browser.tell("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "button",
        "slider",
        "radio",
        "checkbox",
        "searchbox",
        "combobox",
        "image",
        "img",
        "link",
        "table",
        "region",
    }
    seen = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
    worked = [one for one in seen if one[0] in roles]
    assert {"button", "slider", "radio", "checkbox", "searchbox", "combobox", "link", "table"} <= {r for r, _ in worked}
    assert not [one for one in worked if not one[1].strip()]
    assert browser.run("return document.querySelector('html').lang") == "en"
    levels = browser.run("return [...document.querySelectorAll('h1,h2,h3,h4')].map((e) => Number(e.tagName[1]))")
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_the_keyboard_sees_where_it_is(browser, report):
    browser.open(report)
    browser.one("#filter").send_keys(Keys.TAB)
    width = browser.run("return getComputedStyle(document.activeElement).outlineWidth")
    assert browser.run("return document.activeElement.id") == "show-match" and float(width[:-2]) >= 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_rows_of_the_benchmark_and_of_digits_open_beside_runs(browser, published_rows, width, scheme):
    browser.driver.get_log("performance"), browser.driver.get_log("browser")
    browser.open(published_rows, width=width, height=800, prefers_color_scheme=scheme)
    plots_drawn(browser, browser.run("return document.querySelectorAll('.plot').length"))
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert (luminance(browser) > 0.9) == (scheme == "light")
    titles = {name.partition(" (")[0] for name in browser.texts("main h2")}
    assert {"ring8", "grid25", "unseen-2d", "digits", "digits 2", "digits.json"} <= titles
    assert {f"run-{name}" for name in RUNS} <= set(browser.texts("#chips label"))
    shown = browser.texts("tbody th")
    assert {"kd", "dmd", "ctm_gan", "digits_add", "digits_kd"} <= {name.partition("\n")[0] for name in shown}
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    requests = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = {r["request"]["url"] for r in requests if r["documentURL"] == published_rows.as_uri()}
    assert {url for url in asked if not url.startswith("data:")} == {published_rows.as_uri()}
    assert browser.driver.get_log("browser") == []


RUNS = {
    "consistency": (),
    "kd": ("--method.pairs", "16", "--method.teacher-steps", "2"),
}
"""Experiments on digits, made small by these flags as well."""


@pytest.fixture(scope="module")
def published_rows(tmp_path_factory, one_device):
    """The page of all rows in experiments/results, with their samples where they are kept, and of tiny runs."""
    folder = tmp_path_factory.mktemp("published")
    results = Path(__file__).parents[1] / "experiments" / "results"
    flags = ["--network.width", "16", "--network.blocks", "1", "--teacher.steps", "2", "--steps", "2"]
    for name, more in RUNS.items():
        experiment, run = results.parent / f"digits_{name}.py", folder / "runs" / f"run-{name}"
        assert main(["distill", str(experiment), "--workdir", str(run), *flags, "--batch-size", "8", *more]) == 0
    given = [str(folder / "runs"), str(results / "exact.json"), str(results / "digits.json")]
    assert main(["report", *given, "--out", str(folder), "--samples", "9", "--steps", "1", "2"]) == 0
    return folder / "index.html"


def test_a_hundred_runs_are_drawn_as_they_come_into_view(browser, tmp_path):
    path = tmp_path / "index.html"
    write_page(path, page(100))
    browser.open(path)
    assert len(browser.texts("#chips input")) == 100 and len(browser.texts("#group-0 tbody tr")) == 2 + 3 * 100
    assert browser.texts("#shown-count") == ["7 of 100"]
    browser.run("document.getElementById('show-match').click()")
    browser.wait("document.querySelectorAll('#group-0 .gallery figure').length === 101")
    drawn = "document.querySelectorAll('#group-0 .gallery img').length"
    assert browser.run(f"return {drawn}") < 60
    browser.run("document.querySelector('#group-0 .gallery figure:last-child').scrollIntoView()")
    browser.wait("document.querySelector('#group-0 .gallery figure:last-child img')")
    browser.one("#filter").send_keys("run04")
    visible = "[...document.querySelectorAll('#group-0 tbody tr')].filter((r) => !r.hidden)"
    assert browser.run(f"return {visible}.length") == 2 + len(STEPS) * 10
    assert browser.texts("#live") == ["10 of 100 match"]
    assert browser.run("return [...document.querySelectorAll('#chips label')].filter((r) => !r.hidden).length") == 10
