"""A small stand-in for text to image: 8 conditions of 4 modes each in the plane, and one-step students of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Training
from flax import nnx
from jax import Array

from ddistill.data.pairs import teacher_pairs
from ddistill.evaluate.diversity import condition_diversity
from ddistill.evaluate.mixture import SCALE
from ddistill.losses.times import LogNormal
from ddistill.methods import Denoising
from ddistill.methods.adversarial import Adversary
from ddistill.methods.base import Method, Space
from ddistill.methods.discriminators import Plain
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import EDMPrecondition, Net, from_nnx, guided
from ddistill.networks.mlp import MLP
from ddistill.process import Process, edm

CLASSES, MODES, STD = 8, 4, 0.1
PROCESS = edm()
ADVERSARY = Adversary(Plain(64, 2), r1=0.01)


def world() -> Mixture:
    """Conditions on a ring of radius 2, each with four modes of standard deviation .1 around its place, at rms .5."""
    angle = 2 * np.pi * np.arange(CLASSES) / CLASSES
    centres = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    corners = 0.5 * np.asarray([[1, 0], [0, 1], [-1, 0], [0, -1]])
    means = (centres[:, None] + corners).reshape(-1, 2)
    labels = np.repeat(np.arange(CLASSES, dtype=np.int32), MODES)
    covariances = [STD**2 * np.eye(2)] * len(means)
    return Mixture.from_covariances(np.full(len(means), 1 / len(means)), means, covariances, labels).standardised(SCALE)


def teacher(w: float) -> Net:
    """The exact denoiser under guidance w; 1 is none."""
    return guided(as_teacher(world(), PROCESS), w, np.int32(CLASSES))


def starts(seeds: int, steps: int = 500) -> list[Net]:
    """For each seed a network with conditions, fitted to the exact denoiser."""
    fit = Training(Denoising(LogNormal(-0.4, 2.0), exact=True)(PROCESS), batches, steps)
    nets = [MLP(2, 64, 2, CLASSES, rngs=nnx.Rngs(jax.random.key(seed))) for seed in range(seeds)]
    made = [from_nnx(net, PROCESS, EDMPrecondition(SCALE)) for net in nets]
    return [fit(net, teacher(1.0), jax.random.key(1000 + i)) for i, net in enumerate(made)]


def batches(key: Array, store: Any, size: int = 256) -> dict[str, Array]:
    """Fresh data with their conditions, or rows of stored pairs."""
    k_cond, k_x = jax.random.split(key)
    if store is not None:
        rows = jax.random.randint(k_cond, (size,), 0, len(store["x"]))
        return {name: array[rows] for name, array in store.items()}
    cond = jax.random.randint(k_cond, (size,), 0, CLASSES)
    return {"x": world().sample(k_x, size, cond), "cond": cond}


@dataclass(eq=False)
class Students:
    """Trains one-step students by a method, updated `steps` times; all seeds and scales share one compilation."""

    config: Callable[[Process], Any]
    steps: int
    learning_rate: float = 1e-3
    _training: Training = field(init=False)

    def __post_init__(self):
        method = self.config(PROCESS)
        every = method.every.get("student", 1)
        self._training = Training(method, batches, self.steps * every, self.learning_rate, space=Space((2,), CLASSES))

    def __call__(self, start: Net, w: float, key: Array) -> dict[str, float]:
        """Train on the teacher guided by w, and measure the samples."""
        method: Method = self._training.method
        store = None
        if method.pairs is not None:
            made = teacher_pairs(
                teacher(w), PROCESS, key, 8000, (2,), steps=method.pairs.steps, num_classes=CLASSES,
                integrator=method.pairs.integrator,
            )  # fmt: skip
            store = {name: jnp.asarray(array) for name, array in made.items()}
        net = self._training(start, teacher(w), key, store)
        return measure(*draw(net))


def draw(net: Net, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Samples of a student in one step, and their conditions."""
    noise, cond = PROCESS.prior(jax.random.key(7), (n, 2)), jnp.arange(n) % CLASSES
    return np.asarray(net.jump(PROCESS, noise, PROCESS.t_max, 0.0, cond)), np.asarray(cond)


def measure(x: np.ndarray, cond: np.ndarray) -> dict[str, float]:
    """How good and how varied samples x [N, 2] of conditions cond [N] are.

    precision: share within 3 standard deviations of a mode of their own condition. recall: share of a condition's
    modes that hold a fifth of their weight or more of its samples, in the mean. diversity: mean distance between
    samples of one condition, over that of true ones. size: root mean square of the samples, over that of true ones.
    """
    mixture = world()
    means = np.asarray(mixture.means).reshape(CLASSES, MODES, 2)[cond]
    distance = np.linalg.norm(x[:, None] - means, axis=-1)
    mode, near = distance.argmin(1), distance.min(1) < 3 * float(np.sqrt(mixture.scales[0, 0]))
    held = np.zeros((CLASSES, MODES))
    np.add.at(held, (cond[near], mode[near]), 1.0)
    share = held / np.bincount(cond, minlength=CLASSES)[:, None]
    true = np.asarray(mixture.sample(jax.random.key(3), len(x), jnp.asarray(cond)))
    return {
        "precision": float(near.mean()),
        "recall": float(np.mean(share > 0.2 / MODES)),
        "diversity": condition_diversity(x, cond) / condition_diversity(true, cond),
        "size": float(np.sqrt(np.mean(x**2) / np.mean(true**2))),
    }
