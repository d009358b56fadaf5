"""Draw digits with strokes, by score distillation from the teacher of a run on digits (Poole et al. 2023).

    ddistill quickstart --out runs/quickstart
    python experiments/sds_scene.py runs/quickstart --out scene.png

A scene is a few strokes: end points, widths and brightnesses, rendered to 8x8 pixels by a differentiable function. No
network is trained for it: the strokes themselves are what the teacher's gradient moves. With --variational the scenes
of a digit are particles with a score of their own, a low-rank adapter of the teacher (Wang et al. 2023). Prints which
share of the scenes a support vector machine, fitted to the scans, reads as their digit, and how much scenes of a digit
differ.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from ddistill import guided
from ddistill.data.digits import load_digits
from ddistill.evaluate import classifier_accuracy, fit_digit_classifier
from ddistill.lora import LoRA
from ddistill.losses.score import NoisePrediction
from ddistill.losses.times import KarrasRamp
from ddistill.methods.dmd import DMD
from ddistill.methods.fake_scores import Auxiliary
from ddistill.methods.sds import SDS, particles
from ddistill.report import image_grid
from ddistill.runs import open_run
from ddistill.stages import Stage, run


def strokes(key, scenes, count):
    """Random strokes in the unit square: ends [n, count, 2, 2], log-widths and brightness logits [n, count]."""
    ends = jax.random.uniform(key, (scenes, count, 2, 2), minval=0.2, maxval=0.8)
    return {"ends": ends, "width": jnp.full((scenes, count), -2.4), "light": jnp.full((scenes, count), 1.0)}


def render(scene, size=8):
    """A scene's picture [size, size] in [-1, 1]: strokes cover each other like paint, 1 - prod(1 - cover)."""
    line = (jnp.arange(size) + 0.5) / size
    pixels = jnp.stack(jnp.meshgrid(line, line, indexing="xy"), axis=-1)[:, :, None]
    begin, along = scene["ends"][:, 0], scene["ends"][:, 1] - scene["ends"][:, 0]
    share = jnp.sum((pixels - begin) * along, -1) / (jnp.sum(along**2, -1) + 1e-6)
    nearest = begin + jnp.clip(share, 0, 1)[..., None] * along
    distance2 = jnp.sum((pixels - nearest) ** 2, -1)
    cover = jax.nn.sigmoid(scene["light"]) * jnp.exp(-distance2 / (2 * jnp.exp(2 * scene["width"])))
    return 1 - 2 * jnp.prod(1 - cover, axis=-1)


def draw(teacher, process, scenes, labels, *, w, steps, rate, variational, key):
    """The scenes after so many steps of score distillation with guidance w."""
    times = KarrasRamp(0.3, 0.9)
    made = DMD(Auxiliary(lora=LoRA(rank=4)), times, NoisePrediction(), every=1) if variational else SDS(times)
    method = made(process)
    method = dataclasses.replace(
        method, result="student", init={**method.init, "student": lambda t, k, s: particles(render, scenes)}
    )
    batch = {"x": np.zeros((len(labels), 8, 8), np.float32), "cond": np.asarray(labels, np.int32)}
    stage = Stage(
        "scene", method, steps, lambda _: lambda step: batch, lambda n: optax.adam(rate),
        guide=lambda net: guided(net, w, np.int32(-1)),
    )  # fmt: skip
    return run([stage], teacher, key)[-1].params


def judged(scenes, labels, digits):
    """Share of scenes read as their digit, and the root-mean-square difference of scenes of one digit, per pixel."""
    pictures = np.asarray(jax.vmap(render)(scenes))
    read = classifier_accuracy(fit_digit_classifier(digits.train_x, digits.train_labels), pictures, labels)
    spread = np.mean([pictures[labels == c].std(0) ** 2 for c in np.unique(labels)]) ** 0.5
    return pictures, read, float(spread)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run on digits")
    parser.add_argument("--out", type=Path, default=Path("scene.png"))
    parser.add_argument("--scenes", type=int, default=4, help="scenes of each digit")
    parser.add_argument("--strokes", type=int, default=6)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variational", action="store_true")
    args = parser.parse_args()
    opened, digits = open_run(args.run), load_digits()
    k_scenes, k_run = jax.random.split(jax.random.key(args.seed))
    labels = np.tile(np.arange(10), args.scenes)
    scenes = strokes(k_scenes, len(labels), args.strokes)
    before = judged(scenes, labels, digits)
    scenes = draw(
        opened.teacher, opened.experiment.process, scenes, labels,
        w=args.guidance, steps=args.steps, rate=args.rate, variational=args.variational, key=k_run,
    )  # fmt: skip
    after = judged(scenes, labels, digits)
    for name, (_, read, spread) in (("random strokes", before), (f"after {args.steps} steps", after)):
        print(f"{name}: {read:.0%} read as their digit, spread within a digit {spread:.3f}")
    pictures = np.kron(digits.to_unit(after[0])[..., None], np.ones((1, 8, 8, 1)))
    Image.fromarray(image_grid(pictures, columns=10).squeeze(2)).save(args.out)
    print(f"wrote {args.out}, one column for each digit")


if __name__ == "__main__":
    main()
