"""Samples that a report has drawn, kept in the run's folder for the next report."""

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddistill import storage
from ddistill.cli.report_runs import Found, Shown
from ddistill.cli.rows import fingerprint, stamp
from ddistill.report.page import Drawn, Motion, Sheet
from ddistill.version import version

FILE = "report.npz"


def identity(run: Found, models: Path | None, **asked: Any) -> dict[str, Any]:
    """JSON that tells what a run's samples are of: its checkpoints, the networks it names, what is asked for.

    models: as for `drawn_of`. That data was replaced where it lies is not noticed.
    """
    data = run.config["data"]
    own = [_field(run.config.get("network"), "folder"), _field(data, "models"), _field(_field(data, "data"), "models")]
    folders = [folder for folder in (*own, models and str(models)) if isinstance(folder, str)]
    source = run.folder / "experiment.py"
    made = {
        "ddistill": version(),
        "run": fingerprint(run.folder),
        "experiment": hashlib.sha256(source.read_bytes() if source.is_file() else b"").hexdigest(),
        "networks": {folder: stamp(Path(folder)) for folder in folders if Path(folder).exists()},
        **asked,
    }
    return json.loads(json.dumps(made))


def _field(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else None


def kept(run: Found, made: Mapping[str, Any]) -> Shown | None:
    """The samples in the run's folder, None where there are none of what was asked for."""
    try:
        with np.load(run.folder / FILE, allow_pickle=False) as file:
            about = json.loads(file["about"].item())
            if about["made"] != made:
                return None
            drawn = [
                Drawn(label, kind, {n: Sheet(file[f"{label}/{n}"]) for n in steps})
                for label, kind, steps in about["drawn"]
            ]
            motions = [Motion(label, kind, noise, file[f"{label}/motion"]) for label, kind, noise in about["motions"]]
            return Shown(drawn, motions, about["words"])
    except Exception:  # no file, a damaged one, or one of something else, which may be anything
        return None


def keep(run: Found, made: Mapping[str, Any], shown: Shown) -> None:
    """Put samples into the run's folder, whole or, where it cannot be written, not at all."""
    about = {
        "made": made,
        "drawn": [[d.label, d.kind, list(d.sheets)] for d in shown.drawn],
        "motions": [[m.label, m.kind, [float(a) for a in m.noise]] for m in shown.motions],
        "words": shown.words,
    }
    arrays: dict[str, Any] = {f"{d.label}/{n}": sheet.x for d in shown.drawn for n, sheet in d.sheets.items()}
    arrays |= {f"{m.label}/motion": m.x for m in shown.motions}
    file = io.BytesIO()
    np.savez_compressed(file, about=np.asarray(json.dumps(about)), **arrays)
    with contextlib.suppress(OSError):
        storage.put(run.folder / FILE, file.getvalue())
