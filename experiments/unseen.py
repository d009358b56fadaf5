"""A mixture that nobody tuned for: random modes, widths and weights, for `ddistill bench exact --mixture FILE`.

    python experiments/unseen.py --d 2 --out unseen-2d.npz
    python experiments/unseen.py --d 16 --out unseen-16d.npz

Modes are where a normal law puts them, apart by three widths at least; their covariances have random directions and
widths within a factor of five.
"""

import argparse
from pathlib import Path

import numpy as np


def mixture(d: int, modes: int, seed: int) -> dict[str, np.ndarray]:
    """weights [modes], means [modes, d], covariances [modes, d, d], labels [modes]."""
    rng = np.random.default_rng(seed)
    widths = np.exp(rng.uniform(np.log(0.03), np.log(0.15), (modes, d)))
    means: list[np.ndarray] = []
    while len(means) < modes:
        new = rng.standard_normal(d)
        if all(np.linalg.norm(new - old) > 3 * widths.max() for old in means):
            means.append(new)
    bases = np.linalg.qr(rng.standard_normal((modes, d, d)))[0]
    weights = rng.uniform(1, 5, modes)
    return {
        "weights": weights / weights.sum(),
        "means": np.stack(means),
        "covariances": (bases * widths[:, None] ** 2) @ bases.swapaxes(1, 2),
        "labels": np.arange(modes) % 4,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=2)
    parser.add_argument("--modes", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    np.savez(args.out, **mixture(args.d, args.modes, args.seed))


if __name__ == "__main__":
    main()
