"""The metrics that networks' features give, by name: what each needs, and how it is computed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ddistill.evaluate.kernels import cmmd, inception_score, kid
from ddistill.evaluate.metrics import frechet_parts
from ddistill.evaluate.neighbours import manifold
from ddistill.evaluate.seen import Seen, Wanted

STANDARD = 50_000
"""The number of samples that FID and most numbers here are told for."""

Scores = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """A metric of two sets of images.

    title: for tables. feature: what it reads, "network.output", of which the moments or the rows; "pairs" are those of
    images. score: (fake, real, seed) -> numbers by name, the first of which has the metric's own; None where samplers
    are judged by more than two sets of images (`quality`). better: which end is good. form: of the number. how: its
    settings, in words.
    """

    title: str
    feature: str
    of: Literal["moments", "rows", "pairs"]
    score: Callable[[Seen, Seen, int], Scores] | None
    better: Literal["lower", "higher"]
    form: str
    how: str


def _frechet(name: str, feature: str) -> Callable[[Seen, Seen, int], Scores]:
    def score(fake: Seen, real: Seen, seed: int) -> Scores:
        one, other = fake.moments[feature], real.moments[feature]
        found = frechet_parts(one.mean, one.covariance, other.mean, other.covariance)
        clipped = {f"{name}_clipped": found.clipped} if found.clipped > 1e-6 else {}
        return {name: found.distance, **clipped}

    return score


def _near(name: str, k: int) -> Callable[[Seen, Seen, int], Scores]:
    def score(fake: Seen, real: Seen, seed: int) -> Scores:
        found = manifold(real.rows["inception.pool"], fake.rows["inception.pool"], k)
        return {n: v for n, v in found._asdict().items() if (n in ("precision", "recall")) == (k == 3)}

    return score


def _kid(fake: Seen, real: Seen, seed: int) -> Scores:
    found = kid(fake.rows["inception.pool"], real.rows["inception.pool"], seed=seed)
    return {"kid": found.mean, "kid_std": found.std}


def _is(fake: Seen, real: Seen, seed: int) -> Scores:
    mean, std = inception_score(fake.rows["inception.logits"], seed=seed)
    return {"inception_score": mean, "inception_score_std": std}


def _cmmd(fake: Seen, real: Seen, seed: int) -> Scores:
    return {"cmmd": cmmd(fake.rows["clip.embedding"], real.rows["clip.embedding"])}


def _balls(name: str, k: int) -> Metric:
    return Metric(name, "inception.pool", "rows", _near(name, k), "higher", ".3f", f"k = {k}")


METRICS: Mapping[str, Metric] = {
    "fid": Metric("FID", "inception.pool", "moments", _frechet("fid", "inception.pool"), "lower", ".2f", ""),
    "sfid": Metric("sFID", "inception.spatial", "moments", _frechet("sfid", "inception.spatial"), "lower", ".2f", ""),
    "kid": Metric(
        "KID", "inception.pool", "rows", _kid, "lower", ".5f", "100 subsets of 1000, or of all where there are fewer"
    ),
    "inception_score": Metric("IS", "inception.logits", "rows", _is, "higher", ".2f", "10 splits"),
    "precision": _balls("precision", 3),
    "recall": _balls("recall", 3),
    "density": _balls("density", 5),
    "coverage": _balls("coverage", 5),
    "fd_dinov2": Metric(
        "FD-DINOv2", "dinov2.embedding", "moments", _frechet("fd_dinov2", "dinov2.embedding"), "lower", ".1f", ""
    ),
    "cmmd": Metric("CMMD", "clip.embedding", "rows", _cmmd, "lower", ".3f", "σ = 10, times 1000"),
    "clip_score": Metric("CLIP", "clip.embedding", "rows", None, "higher", ".2f", "100 max(cos, 0) with the prompts"),
    "lpips": Metric("LPIPS", "lpips.distance", "pairs", None, "higher", ".3f", "between images of one condition"),
}
"""Metrics by name."""


SHORT = {"is": "inception_score"}
"""Other names that are taken for metrics."""


def chosen(names: str | None, networks: Iterable[str], prompts: bool = False) -> tuple[str, ...]:
    """The names of metrics in "fid,kid", or those that the given networks allow where there are none.

    prompts: whether there are some, which clip_score needs. Raises ValueError for unknown metrics, and for those whose
    network is not given.
    """
    networks = set(networks)
    if names is None:
        allowed = [name for name, metric in METRICS.items() if metric.feature.split(".")[0] in networks]
        return tuple(name for name in allowed if name != "clip_score" or prompts)
    asked = tuple(dict.fromkeys(SHORT.get(name.strip(), name.strip()) for name in names.split(",") if name.strip()))
    unknown = [name for name in asked if name not in METRICS]
    if unknown or not asked:
        raise ValueError(f"no metric {', '.join(unknown) or 'was named'}; known are {', '.join(METRICS)}")
    lacking = {METRICS[name].feature.split(".")[0] for name in asked} - networks
    if lacking:
        needing = [name for name in asked if METRICS[name].feature.split(".")[0] in lacking]
        raise ValueError(
            f"{', '.join(needing)} need features of {', '.join(sorted(lacking))}: give the file of its weights, "
            f"--features {sorted(lacking)[0]}=FILE"
        )
    if "clip_score" in asked and not prompts:
        raise ValueError("clip_score is of images and their prompts: give them, one a line, with --prompts FILE")
    return asked


def wanted(names: Sequence[str]) -> Wanted:
    """What features metrics need."""
    metrics = [METRICS[name] for name in names]
    return Wanted(*(frozenset(m.feature for m in metrics if m.of == of) for of in ("moments", "rows")))


def scores(names: Sequence[str], fake: Seen, real: Seen, seed: int = 0) -> Scores:
    """All numbers of some metrics: those of their names, and kid_std, is_std, fid_clipped and the like beside them."""
    found: Scores = {}
    for name in names:
        score = METRICS[name].score
        if name not in found and score is not None:
            found |= score(fake, real, seed)
    return {key: value for key, value in found.items() if key in names or key.rpartition("_")[2] in ("std", "clipped")}
