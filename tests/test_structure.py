"""The shape of the source: which way imports point, how long a method may be, and what no file may say."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ddistill"
LINE = (
    {"process", "version", "sharding", "overrides", "maintenance", "launchers", "goodput", "digests"},
    {"signals"},
    {"gathering", "hosts", "storage"},
    {"seals", "divergence"},
    {"checkpoint", "log"},
    {"grids", "net", "losses"},
    {"features", "mixture", "integrators", "networks"},
    {"lora"},
    {"sample", "methods", "data", "hub"},
    {"prompts"},
    {"train", "config"},
    {"loop"},
    {"stages", "quickstart", "datasets", "published"},
    {"evaluate", "report"},
    {"previews"},
    {"runs", "bench"},
    {"compare", "dry_run"},
    {"plan"},
    {"cli"},
    {"__init__", "__main__"},
)
"""Modules from the process to the command line: each imports only what stands before its own place."""


def modules():
    """Every source file, with the module or folder of the package that it belongs to."""
    return [(path, path.relative_to(PACKAGE).with_suffix("").parts[0]) for path in sorted(PACKAGE.rglob("*.py"))]


def imported(path):
    """(line, module of the package) for each import of the package, also inside functions; "" is the package itself."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write imports from the package's root, without dots"
            names = [node.module] if node.module != "ddistill" else [f"ddistill.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "ddistill":
                yield node.lineno, name.partition(".")[2].partition(".")[0]


def test_every_module_has_its_place_on_the_line():
    assert sum(len(place) for place in LINE) == len(set.union(*LINE))
    assert {module for _, module in modules()} == set.union(*LINE)


def test_imports_point_along_the_line_and_never_back():
    place = {module: i for i, group in enumerate(LINE) for module in group} | {"": len(LINE)}
    back = [
        f"{path.relative_to(ROOT)}:{line}: {module} imports {other or 'the package itself'}"
        for path, module in modules()
        for line, other in imported(path)
        if other != module and place[other] >= place[module]
    ]
    assert not back, "imports that point back along the line:\n" + "\n".join(back)


def test_the_line_is_seen_by_the_parser(tmp_path):
    path = tmp_path / "m.py"
    path.write_text("import ddistill\nfrom ddistill import grids, cli\ndef f():\n    from ddistill.net import Net\n")
    assert sorted(imported(path)) == [(1, ""), (2, "cli"), (2, "grids"), (4, "net")]


METHODS = [path for path in sorted((PACKAGE / "methods").glob("*.py")) if path.stem != "base"]  # what a method is


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_method_fits_on_200_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= 200


def test_no_file_names_a_folder_of_the_machine_it_was_written_on():
    folder = re.compile(r"(?<![\w.:/])/(?:home|root|work|Users|mnt|tmp)/\w+")
    files = [*ROOT.glob("*.*"), *(p for name in ("ddistill", "tests", "experiments") for p in (ROOT / name).rglob("*"))]
    text = [p for p in files if p.suffix in {".py", ".md", ".toml", ".sh", ".cfg", ".txt"}]
    assert len(text) > 50
    said = [f"{p.relative_to(ROOT)}: {m.group()}" for p in text for m in folder.finditer(p.read_text("utf-8"))]
    assert not said, said
    assert folder.search("see " + "/".join(["", "home", "me", "x"])) and not folder.search("https://h.org/home/me")


def stray_strings(tree):
    """Lines of strings that nothing takes: neither a docstring, nor the words on the field or constant before them."""
    for node in ast.walk(tree):
        blocks = [getattr(node, name, None) for name in ("body", "orelse", "finalbody")]
        for block in (block for block in blocks if isinstance(block, list)):
            for before, line in zip([None, *block], block, strict=False):
                said = isinstance(line, ast.Expr) and isinstance(getattr(line.value, "value", None), str)
                if said and not (before is None or isinstance(before, ast.Assign | ast.AnnAssign)):
                    yield line.lineno


def test_no_string_is_left_behind_a_line_that_was_to_be_continued():
    files = [p for name in ("ddistill", "tests", "experiments") for p in sorted((ROOT / name).rglob("*.py"))]
    stray = [f"{p.relative_to(ROOT)}:{n}" for p in files for n in stray_strings(ast.parse(p.read_text("utf-8")))]
    assert not stray, stray
    code = 'def f():\n    """A."""\n    x = 1\n    """B."""\n    return "a"\n    "b"\n'
    assert list(stray_strings(ast.parse(code))) == [6]
