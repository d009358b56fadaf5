"""The page of a report as HTML: Jinja2 for its text, Vega-Lite for its plots, both inside the one file."""

import functools
import json
import math
from pathlib import Path
from typing import Any

from ddistill.report import embed
from ddistill.report.charts import charts
from ddistill.report.page import Column, Page, best, differing

_SCRIPTS = ("core.js", "table.js", "samples.js", "motion.js", "charts.js", "main.js")
_TEMPLATES = Path(__file__).parent / "templates"


def write_page(path: str | Path, page: Page, *, samples: int = 36, limit: float = 24.0) -> str:
    """Write the page, and the folders on the way; answers in words how much it holds and what was left out.

    samples: images of a sheet, points being twelve times as many. limit: the most that pictures and points may take, in
    10⁶ bytes; where they would take more, sheets get fewer samples, and then sheets are left out from the last run on.
    Raises ImportError without the libraries of the extra `report`, OSError where the file cannot be written.
    """
    text, said = render(page, samples=samples, limit=limit)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"cannot write the report {path}: {error.strerror or error}. Give --out a folder that you may write to"
        ) from error
    return said


def render(page: Page, *, samples: int = 36, limit: float = 24.0) -> tuple[str, str]:
    """The text of the page, and what is said of its size; see `write_page`."""
    try:
        import jinja2
        import vl_convert
    except ImportError as error:
        raise ImportError(f'reports need {error.name}: pip install "ddistill[report]"') from error
    data, said = embedded(page, samples, limit)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["value"] = value
    paths, rows, common = differing(page.runs)
    text = environment.get_template("page.html").render(
        page=page, best=best, finite=_finite, said=said, names=paths, rows=rows, common=common,
        data=json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
        vega=_vega(),
        vega_version=vl_convert.get_vega_version(),
        style=(_TEMPLATES / "style.css").read_text(encoding="utf-8"),
        script="\n".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in _SCRIPTS),
    )  # fmt: skip
    return text, said


def embedded(page: Page, samples: int, limit: float) -> tuple[dict[str, Any], str]:
    """What the page's scripts read, and words on how much it is."""
    count = samples
    groups = _groups(page, count)
    while embed.size(groups) > limit * 1e6 and count > 4:
        count = max(4, count // 2)
        groups = _groups(page, count)
    left_out = 0
    for group in reversed(groups):
        while embed.size(groups) > limit * 1e6 and len(group["drawn"]) > 1:
            group["drawn"].pop()
            left_out += 1
    said = f"{embed.size(groups) / 1e6:.1f} MB of samples, at most {count} images or {12 * count} points a sheet"
    if count < samples:
        said += f" (asked for {samples}; fewer keep the page under {limit:g} MB)"
    if left_out:
        said += f"; the samples of {left_out} samplers are left out to keep it under {limit:g} MB"
    curves = {run.name: {k: embed.curve(*c) for k, c in run.curves.items()} for run in page.runs if run.curves}
    return {"students": page.students, "groups": groups, "curves": curves, "charts": charts()}, said


def _groups(page: Page, samples: int) -> list[dict[str, Any]]:
    made = []
    for group in page.groups:
        frame = embed.frame(group)
        first = group.tables[0] if group.tables else None
        made.append({
            "title": group.title,
            "frame": frame,
            "centres": [] if group.centres is None else [[float(a), float(b)] for a, b in group.centres],
            "modes": group.modes,
            "columns": [_column(c) for c in first.columns] if first else [],
            "lines": [
                {
                    "label": line.label, "kind": line.kind, "nfe": line.nfe,
                    "values": {k: _finite(v) for k, v in line.values.items()},
                    "spread": {k: _finite(v) for k, v in line.spread.items()},
                }
                for line in first.lines
            ] if first else [],
            "drawn": [embed.drawn(d, frame, samples) for d in group.drawn],
            "motions": [embed.motion(m, frame) for m in group.motions] if frame else [],
        })  # fmt: skip
    return made


def _column(column: Column) -> dict[str, Any]:
    return {"name": column.name, "title": column.title, "better": column.better}


def value(number: float | None, form: str) -> str:
    """A number as it is written in a cell."""
    return "–" if number is None or not math.isfinite(number) else format(number, form)


def _finite(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else number


@functools.cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which takes a second to bundle."""
    import vl_convert

    return _script(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _script(code: str) -> str:
    """Code that may stand inside a script element: nothing in it ends the element or begins a comment."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")
