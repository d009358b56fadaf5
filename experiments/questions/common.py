"""What the experiments on the slides' questions share: exact teachers, small students, one table."""

import argparse
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from ddistill.data.pairs import teacher_pairs
from ddistill.evaluate.mixture import SCALE, Judge, judge
from ddistill.integrators.exact import flow_map
from ddistill.losses.times import KarrasRamp, LogNormal
from ddistill.methods import Denoising
from ddistill.methods.base import UNKNOWN, Method, Pairs, Round, Space, rounds, split_steps
from ddistill.methods.dmd import DMD
from ddistill.methods.fake_scores import Auxiliary, Fake
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import EDMPrecondition, Net, Preconditioning, from_nnx, retime
from ddistill.networks.mlp import MLP
from ddistill.process import Process, edm
from ddistill.sample import matched_noise, sample
from ddistill.stages import prepare, result
from ddistill.train import make_trainer

Batches = Callable[[Array, Any], dict[str, Array]]
"""batches(key, store) -> batch, traced; the store is what a round has made before, such as teacher pairs."""


def isotropic(weights: Sequence[float], means: Sequence[Sequence[float]], variances: Sequence[float]) -> Mixture:
    """A mixture of round Gaussians: weights [K], means [K][d], variances [K]."""
    d = len(means[0])
    return Mixture.from_covariances(weights, means, [v * np.eye(d) for v in variances])


def gaussian(std: float = 0.5) -> Mixture:
    """One Gaussian in one dimension: its flow map is linear."""
    return isotropic([1.0], [[0.0]], [std**2])


def gmm1d(a: float = 2.0) -> Mixture:
    """½ N(−a, .5²) + ½ N(a, .5²)."""
    return isotropic([0.5, 0.5], [[-a], [a]], [0.25, 0.25])


def gmm2d() -> Mixture:
    """Three round modes of weights .5, .3, .2 in the plane."""
    return isotropic([0.5, 0.3, 0.2], [[2, 0], [-1.5, 1], [0, -2]], [0.1, 0.2, 0.15])


def gmm8(d: int = 2, seed: int = 0) -> Mixture:
    """Eight equal modes of variance .05 with means 1.5 N(0, I) in d dimensions."""
    means = 1.5 * np.random.default_rng(seed).standard_normal((8, d))
    return isotropic([0.125] * 8, means.tolist(), [0.05] * 8)


@dataclass(frozen=True)
class Case:
    """A mixture at root-mean-square .5 with its exact teacher, shared noise, and where the exact flow takes it."""

    mixture: Mixture
    process: Process
    teacher: Net
    noise: Array
    exact: Array
    judge: Judge

    def endpoint(self, x: Array) -> float:
        """Root-mean-square distance of x from the exact end points, over the data's scale."""
        return float(jnp.sqrt(jnp.mean((x - self.exact) ** 2))) / SCALE

    def sw2(self, x: Array) -> float:
        """Sliced Wasserstein-2 distance of x to the mixture, over the data's scale."""
        return self.judge.sw2(np.asarray(x)) / SCALE


def case(mixture: Mixture, samples: int = 4000, scale: bool = True) -> Case:
    """The mixture, scaled to root-mean-square .5 unless told not to, on the EDM process."""
    mixture, process = mixture.standardised(SCALE) if scale else mixture, edm()
    teacher = as_teacher(mixture, process)
    noise = process.prior(jax.random.key(7), (samples, mixture.d))
    exact = flow_map(teacher.bind(), process, noise, process.t_max, 0.0)
    return Case(mixture, process, teacher, noise, exact, judge(mixture, samples))


def network(
    case: Case,
    seed: int,
    width: int = 64,
    blocks: int = 3,
    process: Process | None = None,
    precondition: Preconditioning | None = None,
) -> Net:
    """A fresh residual MLP, by default on the case's process with EDM's preconditioning."""
    module = MLP(case.mixture.d, width, blocks, rngs=nnx.Rngs(jax.random.key(seed)))
    return from_nnx(module, process or case.process, precondition or EDMPrecondition(SCALE))


def data(case: Case, size: int = 256) -> Batches:
    """Batches of fresh samples of the mixture."""
    return lambda key, _: {"x": case.mixture.sample(key, size)}


@dataclass(eq=False)
class Training:
    """Trains a method on batches(key, store), in one compiled loop that all seeds share.

    every: `probe(net, step)` is called before the first step and after each `every` of them, with the network that is
    being trained, not its average. space: what samples look like, for methods with a memory of them.
    """

    method: Method
    batches: Batches
    steps: int
    learning_rate: float = 2e-3
    every: int = 0
    number: int = 0
    space: Space = UNKNOWN
    _compiled: Any = field(default=None, init=False)

    def __call__(
        self,
        start: Net,
        teacher: Net,
        key: Array,
        store: Any = None,
        probe: Callable[[Net, int], None] | None = None,
    ) -> Net:
        """The method's result after training from `start` (which init starts from) against `teacher`."""
        k_start, k_batches = jax.random.split(key)
        if self._compiled is None:
            trainer = make_trainer(self.method, {name: self._optimizer(name) for name in self.method.losses})
            self._compiled = trainer, jax.jit(functools.partial(self._chunk, trainer))
        trainer, loop = self._compiled
        nets, state = prepare(trainer, start, teacher, k_start, self.space)
        chunk = self.every or self.steps
        name = self.method.ema.get(self.method.result, (self.method.result,))[0]
        for step in range(0, self.steps, chunk):
            if probe is not None:
                probe(nets[name].replace(params=state.params[name]), step)
            keys = jax.vmap(lambda i: jax.random.fold_in(k_batches, i))(step + jnp.arange(chunk))
            state = loop(state, nets, store, keys)
        if probe is not None:
            probe(nets[name].replace(params=state.params[name]), self.steps)
        return result(trainer, state, nets)

    def _optimizer(self, name: str) -> optax.GradientTransformation:
        updates = -(-self.steps // self.method.every.get(name, 1))
        warmup = min(50, updates // 4)
        return optax.adam(optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, updates))

    def _chunk(self, trainer, state, nets, store, keys):
        turns = [self.method.turn(i) for i in range(math.lcm(*self.method.every.values()))]
        distinct = sorted(set(turns))
        which = jnp.asarray([distinct.index(turn) for turn in turns])

        def body(state, key):
            def take(turn):
                return lambda state: trainer.step(
                    state, nets, self.batches(key, store), turn, self.steps, self.number
                )[0]  # fmt: skip

            return jax.lax.switch(which[state.step % len(turns)], [take(turn) for turn in distinct], state), None

        return jax.lax.scan(body, state, keys)[0]


def fitting(case: Case, steps: int = 1500) -> Training:
    """The regression of a network on the exact denoiser."""
    return Training(Denoising(LogNormal(-0.4, 2.0), exact=True)(case.process), data(case), steps)


@dataclass(frozen=True)
class Student:
    """A trained student with the way it is sampled."""

    net: Net
    process: Process
    method: Method
    case: Case

    def __call__(self, steps: int, gamma: float | None = None, times: Any = None, noise: Array | None = None) -> Array:
        """Samples from the case's noise, or other noise of the EDM process, in so many steps."""
        sampling = self.method.sampling
        noise = self.case.noise if noise is None else noise
        x = matched_noise(noise, self.case.process, self.process)
        times = sampling.times(steps) if times is None else times
        gamma = sampling.gamma if gamma is None else gamma
        return draw(self.net, self.process, jnp.asarray(times, jnp.float32), x, jax.random.key(5), gamma)


@functools.partial(jax.jit, static_argnums=(1, 5))
def draw(net: Net, process: Process, times: Array, x: Array, key: Array, gamma: float) -> Array:
    """The student sampler, compiled."""
    return sample(net, process, times, x, key if gamma else None, gamma=gamma).x


@dataclass(eq=False)
class Distillation:
    """Trains a method of any number of rounds, with the teacher pairs it asks for; all seeds share compilations."""

    case: Case
    config: Callable[[Process], Any]
    steps: int
    batches: Batches | None = None
    size: int = 256
    learning_rate: float = 2e-3
    most_pairs: int = 20_000
    _trainings: Any = field(default=None, init=False)

    def __call__(self, start: Net, key: Array, teacher: Net | None = None) -> Student:
        """Distil the exact teacher, or another, into a network that starts as `start`."""
        return self.rounds(start, key, teacher)[-1]

    def unchanged(self, start: Net) -> Student:
        """The student before any training."""
        method = rounds(self.config(self.case.process))[-1].method
        return Student(start, self.case.process, method, self.case)

    def rounds(self, start: Net, key: Array, teacher: Net | None = None) -> list[Student]:
        """The same, with the result of every round."""
        if self._trainings is None:
            parts = rounds(self.config(self.case.process))
            counts = split_steps(parts, self.steps)
            self._trainings = [self._training(*one) for one in zip(parts, counts, strict=True)]
        students, process, net = [], self.case.process, start
        seen = self.case.teacher if teacher is None else teacher
        for i, (method, training) in enumerate(self._trainings):
            k_pairs, k_train = jax.random.split(jax.random.fold_in(key, i))
            there = method.process or process
            if there != process:
                net, seen, process = retime(net, process, there), retime(seen, process, there), there
            store = None if method.pairs is None else self._pairs(method.pairs, process, seen, k_pairs)
            net = seen = training(net, seen, k_train, store)
            students.append(Student(net, process, method, self.case))
        return students

    def _training(self, part: Round, steps: int) -> tuple[Method, Training]:
        batches = self.batches or (data(self.case, self.size) if part.method.pairs is None else self._rows)
        space = Space((self.case.mixture.d,))
        return part.method, Training(part.method, batches, steps, self.learning_rate, number=part.number, space=space)

    def _rows(self, key, store):
        rows = jax.random.randint(key, (self.size,), 0, len(store["x"]))
        return {name: array[rows] for name, array in store.items()}

    def _pairs(self, pairs: Pairs, process: Process, teacher: Net, key: Array) -> dict[str, Array]:
        count = min(pairs.count, self.most_pairs)
        options = {"points": pairs.points} if pairs.points else {}
        made = teacher_pairs(
            teacher, process, key, count, (self.case.mixture.d,), steps=pairs.steps, integrator=pairs.integrator,
            **options,
        )  # fmt: skip
        return {name: jnp.asarray(array) for name, array in made.items()}


def starts(case: Case, seeds: int, steps: int = 1000, **sizes: int) -> list[Net]:
    """For each seed a network fitted to the exact denoiser, where its students start."""
    fit = fitting(case, steps)
    return [fit(network(case, seed, **sizes), case.teacher, jax.random.key(1000 + seed)) for seed in range(seeds)]


def published(fake: Fake | None = None, **changes: Any) -> DMD:
    """Distribution matching as in its papers: all noise levels all the time, one learning rate for both networks."""
    return DMD(fake or Auxiliary(), KarrasRamp(), rate=1.0, **changes)


def over_seeds(seeds: int, one: Callable[[int], dict[Any, Any]]) -> dict[Any, np.ndarray]:
    """Collect one(seed) -> {name: value} into {name: values [seeds]}."""
    rows = [one(seed) for seed in range(seeds)]
    return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a markdown table; arrays over seeds become mean ± standard deviation."""
    cells = [[cell(value) for value in row] for row in rows]
    lines = [list(header), ["---"] * len(header), *cells]
    print(f"\n{title}\n")
    for line in lines:
        print("| " + " | ".join(line) + " |")


def cell(value: Any) -> str:
    """A cell: text as it is, a number with three digits, an array over seeds as mean ± standard deviation."""
    if isinstance(value, str):
        return value
    values = np.atleast_1d(np.asarray(value, np.float64))
    mean = digits(values.mean())
    return mean if values.size == 1 else f"{mean} ± {digits(values.std(ddof=1), 2)}"


def digits(value: float, count: int = 3) -> str:
    """A number with so many significant digits, without an exponent where that is short."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    decimals = count - 1 - int(np.floor(np.log10(abs(value))))
    if decimals > 6 or decimals < -3:
        return f"{value:.{count - 1}e}"
    return f"{value:.{max(0, decimals)}f}"


def conclude(holds: bool, text: str) -> None:
    """Print the conclusion, or that this run does not show it."""
    print(f"\n{'Conclusion' if holds else 'NOT shown by this run'}: {text}")


def command_line(main: Callable[..., Any]) -> None:
    """Run an experiment with --seeds, and with --steps and --out where it has them."""
    takes = inspect.signature(main).parameters
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of repetitions; the table gives mean ± std")
    if "steps" in takes:
        parser.add_argument("--steps", type=int, default=takes["steps"].default, help="training steps")
    if "out" in takes:
        parser.add_argument("--out", default=None, help="a picture with error bars, such as picture.png")
    given = vars(parser.parse_args())
    if min(given["seeds"], given.get("steps", 1)) < 1:
        parser.error("--seeds and --steps: at least 1 is needed")
    main(**given)
