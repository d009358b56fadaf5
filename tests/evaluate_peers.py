"""What each process of an evaluation by two does, for test_statistics.py.

python tests/evaluate_peers.py FOLDER PROCESS PORT
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

SIDE, COUNT = 8, 37


def judged():
    """All metrics of a sampler and of the floor, by networks that see linear combinations of pixels."""
    import jax.numpy as jnp
    import numpy as np
    from linear_features import linear_features

    from ddistill import sharding
    from ddistill.config import Data
    from ddistill.data.loading import Unreadable
    from ddistill.evaluate.quality import Study, _of_process, floor, judge, labels_in_turn, variety
    from ddistill.evaluate.real import images_of
    from ddistill.evaluate.samplers import Sampler
    from ddistill.evaluate.scores import METRICS, wanted
    from ddistill.evaluate.statistics import statistics_of
    from ddistill.integrators import Solution
    from ddistill.process import edm

    shape = (SIDE, SIDE, 3)
    networks = {
        "inception": linear_features(SIDE, 1, pool=6, logits=5, spatial=7),
        "dinov2": linear_features(SIDE, 2),
        "clip": linear_features(SIDE, 3),
    }
    texts = np.random.default_rng(2).standard_normal((5, 6)).astype(np.float32)
    x = np.random.default_rng(0).standard_normal((COUNT, *shape)).astype(np.float32) / 2
    images = images_of(Data({"x": x}, shape, 0), "the data")
    whole = images.read

    def read(i):
        if i in (3, 30):  # one of each process
            raise Unreadable(f"{i}: cut off")
        return whole(i)

    images.read = read
    real = statistics_of(images, networks, wanted(tuple(METRICS)), kept=COUNT, batch_size=10)
    # Shades and contrasts of the labels, as whole steps of brightness, so that no rounding of float32 tips one over.
    draw = Sampler("s", lambda x, c, key: Solution(jnp.round(x * (4 + 2 * c[:, None, None, None]) / 80) / 60, 1))
    mesh = sharding.make_mesh()
    study = Study(
        edm(), shape, labels_in_turn(3, 8), lambda x: (np.asarray(x) + 1) / 2, mesh, networks, tuple(METRICS),
        real, 29, 8, texts=texts, lpips=lambda a, b: jnp.mean(jnp.abs(a - b), axis=(1, 2, 3)),
    )  # fmt: skip
    shades = _of_process(8)
    prompts = replace(study, conditions=lambda number: np.linspace(-1, 2, 8)[shades])
    times = "images_per_s", "wall_s", "compile_s", "decode_s"
    rows = floor(study), judge(draw, study)
    numbers = [{k: v for k, v in row.items() if isinstance(v, float | int) and k not in times} for row in rows]
    return [*numbers, {"skipped": len(images.skipped), "lpips of prompts": variety(draw, prompts)}]


if __name__ == "__main__":
    import jax

    folder, process, port = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    (Path(folder) / f"{process}.json").write_text(json.dumps(judged()))
    jax.distributed.shutdown()
