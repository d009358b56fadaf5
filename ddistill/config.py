"""An experiment as nested frozen dataclasses: every field can be overridden on the command line.

An experiment file is Python with one function, `def experiment() -> Experiment`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from ddistill.data import ArraySource, Source, label_dropout
from ddistill.data.loading import Readable, loader, released
from ddistill.data.pair_store import PairStore, open_pairs
from ddistill.data.pairs import at_least_one
from ddistill.divergence import Divergence
from ddistill.hub.configs import kind_with, with_dropout
from ddistill.hub.load import load_network, open_config, open_diffusion
from ddistill.losses.times import LogNormal
from ddistill.methods.base import Made, Space
from ddistill.methods.denoising import Denoising
from ddistill.net import EDMPrecondition, Net, Preconditioning, at_scale, from_nnx
from ddistill.networks import MLP
from ddistill.networks.conditions import Prompt
from ddistill.networks.layers import Remat, rngs_of
from ddistill.process import Process, edm
from ddistill.sharding import Axes, Rule


@dataclass(frozen=True)
class Optimizer:
    """Adam with linear warm-up and cosine decay to zero; weight_decay > 0 makes it AdamW.

    learning_rate: after the warm-up. warmup: its updates, at most half of all. decay: the rate falls to zero by the
    end. b1, b2: of the means of gradients and of their squares. weight_decay: 0 for none. clip: bounds the gradient's
    norm, 0 does not. rectified: RAdam (Liu et al. 2020), whose first steps wait for the second moment, in place of
    Adam.
    """

    learning_rate: float = 1e-3
    warmup: int = 100
    decay: bool = True
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 0.0
    rectified: bool = False

    def build(self, steps: int) -> optax.GradientTransformation:
        """The transformation for a run of so many updates."""
        warmup = max(1, min(self.warmup, steps // 2))
        if self.decay:
            rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, max(steps, warmup + 1))
        else:
            rate = optax.linear_schedule(0.0, self.learning_rate, warmup)
        adam = optax.adamw(rate, self.b1, self.b2, weight_decay=self.weight_decay)
        if self.rectified:
            moments = optax.scale_by_radam(self.b1, self.b2)
            decayed = optax.add_decayed_weights(self.weight_decay)
            adam = optax.chain(moments, decayed, optax.scale_by_learning_rate(rate))
        return optax.chain(optax.clip_by_global_norm(self.clip), adam) if self.clip else adam


def _unit(x) -> np.ndarray:
    return np.clip((np.asarray(x, np.float32) + 1) / 2, 0, 1)


@dataclass(frozen=True)
class Data:
    """What a dataset gives an experiment: arrays of one training set, and the shape and classes of a sample.

    to_unit: from samples to brightness in [0, 1] for pictures; by default for data in [-1, 1]. pairs: teacher pairs on
    disk for methods that learn from them. items: what is read one by one, in place of arrays. null: the condition that
    means none where conditions are no labels, a prompt's without leading axes for example.
    """

    arrays: dict[str, np.ndarray]
    shape: tuple[int, ...]
    num_classes: int
    to_unit: Callable[[np.ndarray], np.ndarray] = _unit
    pairs: PairStore | None = None
    items: Readable | None = None
    null: Any = None

    @property
    def none(self) -> Any:
        """The condition that means none: `null`, the label num_classes, or None where there are no conditions."""
        return np.int32(self.num_classes) if self.null is None and self.num_classes else self.null

    @property
    def space(self) -> Space:
        """What a sample looks like."""
        return Space(self.shape, self.num_classes, self.null)

    def source(self, batch_size: int, seed: int, unlabelled: float) -> Source:
        """Shuffled batches; a share `unlabelled` of the conditions is replaced by "none", for guidance.

        Of several processes each gets its own rows of a batch that depends on the seed and the step alone.
        """
        part = jax.process_index(), jax.process_count()
        source: Source
        if self.items is not None:
            source = loader(self.items, batch_size, seed, part=part)
        else:
            source = ArraySource(
                self.arrays, batch_size=batch_size, seed=seed, num_classes=self.num_classes or None, shape=self.shape,
                part=part,
            )  # fmt: skip
        none = self.none
        return source if none is None or not unlabelled else label_dropout(source, unlabelled, none, part=part)

    def first(self, batch_size: int, seed: int) -> dict[str, Any]:
        """The first batch of `source`, with all conditions, and no thread left that reads."""
        with released(self.source(batch_size, seed, 0.0)) as source:
            return source(0)


class Dataset(Protocol):
    """A dataset's configuration."""

    def load(self) -> Data:
        """Read it."""


class Architecture(Protocol):
    """A network's configuration."""

    def build(self, data: Data, process: Process, key: jax.Array) -> Net:
        """The network at its initialisation."""


@dataclass(frozen=True)
class DigitsData:
    """scikit-learn's scans of handwritten digits, 8x8, ten classes; 70 % of them to train on."""

    seed: int = 0

    def load(self) -> Data:
        """Read it."""
        from ddistill.data.digits import load_digits

        digits = load_digits(self.seed)
        arrays = {"x": digits.train_x, "cond": digits.train_labels}
        return Data(arrays, digits.train_x.shape[1:], digits.num_classes, digits.to_unit)


@dataclass(frozen=True)
class PairsData:
    """A dataset with teacher pairs that `ddistill pairs` made in a folder, from the teacher that is to be distilled."""

    folder: Path
    data: Dataset = field(default_factory=DigitsData)

    def load(self) -> Data:
        """Read the dataset and open the store."""
        return dataclasses.replace(loaded(self.data), pairs=open_pairs(self.folder))


@dataclass(frozen=True)
class MLPNetwork:
    """A residual MLP.

    width: numbers in each layer. blocks: residual blocks. dropout: share of numbers that are dropped in training.
    bfloat16: computes in bfloat16 with float32 parameters.
    """

    width: int = 256
    blocks: int = 4
    dropout: float = 0.0
    bfloat16: bool = False
    precondition: Preconditioning = field(default_factory=EDMPrecondition)

    def build(self, data: Data, process: Process, key: jax.Array) -> Net:
        """The network at its initialisation."""
        module = MLP(
            int(np.prod(data.shape)),
            self.width,
            self.blocks,
            num_classes=data.num_classes,
            dropout=self.dropout,
            dtype=jnp.bfloat16 if self.bfloat16 else jnp.float32,
            rngs=nnx.Rngs(key),
        )
        return from_nnx(module, process, self.precondition)


@dataclass(frozen=True)
class Published:
    """What is known of a teacher and its data before either is there: all that `ddistill distill --dry-run` needs.

    config: the network's configuration, of ddistill/networks. process, precondition: as for `net.from_nnx`. shape,
    num_classes: of the data. prompt: shapes of what conditions that are prompts hold, without the batch, by the names
    of `Prompt`. `ddistill.published` has some.
    """

    config: Any
    process: Process
    precondition: Preconditioning
    shape: tuple[int, ...]
    num_classes: int = 0
    prompt: Mapping[str, tuple[int, ...]] | None = None

    @property
    def data(self) -> Data:
        """Data of this kind, of which there is none."""
        zeros: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in (self.prompt or {}).items()}
        return Data({}, self.shape, self.num_classes, null=Prompt(**zeros) if zeros else None)


@dataclass(frozen=True)
class Imported:
    """A teacher that `ddistill import` put into a folder: nothing trains it, and it brings its own process.

    bfloat16: computes in bfloat16 with float32 parameters. remat: True keeps one block's activations at a time, "dots"
    beside it what matrix products and convolutions gave. guidance: the scale at which a teacher that embeds one, such
    as FLUX.1 dev, is distilled. dropout: the rate in training of all networks that start from it, in place of its
    configuration's; the teacher itself drops nothing.
    """

    folder: Path
    bfloat16: bool = False
    remat: Remat = False
    guidance: float | None = None
    dropout: float | None = None

    @property
    def process(self) -> Process:
        """The process that its scheduler is of."""
        return open_diffusion(self.folder)[0]

    def build(
        self,
        data: Data,
        process: Process,
        key: jax.Array,
        mesh: Mesh | None = None,
        rule: Rule = Rule(),  # noqa: B008
    ) -> Net:
        """The network with its weights, laid out over the mesh by the rule.

        Raises ValueError for another process than its own.
        """
        own, precondition = open_diffusion(self.folder)
        if process != own:
            raise ValueError(
                f"the teacher in {self.folder} has its own process; pass the experiment through `resolved`"
            )
        options: dict[str, Any] = {"dtype": self._dtype, "remat": self.remat, "dropout": self.dropout}
        return self._held(load_network(self.folder, own, precondition, mesh=mesh, rule=rule, **options))

    def abstract(self, published: Published | None = None) -> Net:
        """The network's shapes, those of the folder, or of what is published where there is no such folder."""
        if published is None or self.folder.exists():
            kind, config = open_config(self.folder)
            process, precondition = open_diffusion(self.folder)
        else:
            kind, config = kind_with(published.config), published.config
            process, precondition = published.process, published.precondition
        config = with_dropout(config, self.dropout)
        make = partial(kind.network, config, dtype=self._dtype, remat=self.remat)
        return self._held(from_nnx(nnx.eval_shape(lambda: make(rngs=rngs_of(0))), process, precondition))

    @property
    def _dtype(self) -> Any:
        return jnp.bfloat16 if self.bfloat16 else jnp.float32

    def _held(self, net: Net) -> Net:
        return net if self.guidance is None else at_scale(net, self.guidance)


@dataclass(frozen=True)
class Teacher:
    """How the teacher is trained before it is distilled.

    steps: its training steps. unlabelled: share of the labels that are left out, for guidance.
    """

    method: Denoising = field(default_factory=lambda: Denoising(times=LogNormal(-0.8, 1.4)))
    steps: int = 3000
    optimizer: Optimizer = field(default_factory=Optimizer)
    unlabelled: float = 0.1

    def __post_init__(self):
        at_least_one(**{"teacher.steps": self.steps})
        if not 0 <= self.unlabelled <= 1:
            raise ValueError(f"teacher.unlabelled = {self.unlabelled} is a share of the labels: give 0 to 1")


@dataclass(frozen=True)
class Experiment:
    """A teacher, and a method that distils it. Seeds fix everything that is random.

    name: of the run, runs/NAME by default. guidance: the scale at which the method sees the teacher; 1 is none. steps:
    training steps of the student, of all rounds together. batch_size: on all devices together. accumulate: gradients
    are averaged over so many parts of each batch. seed: of initial weights, batches and noise. log_every: steps between
    metrics. checkpoint_every: steps between checkpoints. published: what a dry run takes for an imported teacher and
    its data where their folders are not there.
    fsdp: groups of so many devices share one copy of parameters and optimiser states; each device keeps a part.
    tensor: so many devices work on the same samples, each on a part of the heads and the feed-forward map of a
    transformer's blocks. Their product divides the number of devices, and the batch is split over the others and fsdp.
    layout: exceptions to how parameters are split, `sharding.rule_of`: {"*.ff.net.2.kernel": (None, "fsdp")}.
    steps_per_dispatch: steps taken in one call, more than one for networks so small that calls take most of the time.
    preview_every: after so many steps of a stage samples go into the log, drawn from the same noise each time, and how
    far `preview_samples` of them are from data (`ddistill.previews`); 0 draws none. wandb: a project of Weights &
    Biases that is told all of it as well.
    """

    name: str
    method: Callable[[Process], Made]
    data: Dataset = field(default_factory=DigitsData)
    process: Process = field(default_factory=edm)
    network: Architecture = field(default_factory=MLPNetwork)
    teacher: Teacher = field(default_factory=Teacher)
    published: Published | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    guidance: float = 1.0
    steps: int = 3000
    batch_size: int = 256
    accumulate: int = 1
    fsdp: int = 1
    tensor: int = 1
    layout: Mapping[str, tuple[Axes, ...]] = field(default_factory=dict)
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    steps_per_dispatch: int = 1
    divergence: Divergence = field(default_factory=Divergence)
    preview_every: int = 0
    preview_samples: int = 256
    wandb: str = ""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, type):
                raise ValueError(f"{f.name} is the class {value.__name__}: write {value.__name__}()")
        if not callable(self.method):
            raise ValueError(f"method = {self.method!r} is no method: give one of ddistill.methods, KD() for example")
        if not hasattr(self.data, "load"):
            raise ValueError(
                f"data = {self.data!r} has no load(): give a dataset, ImageFolder('photos', size=64) for example"
            )
        if not hasattr(self.network, "build"):
            raise ValueError(f"network = {self.network!r} has no build(): give one, MLPNetwork(width=128) for example")
        counts = "steps batch_size accumulate fsdp tensor log_every checkpoint_every steps_per_dispatch preview_samples"
        at_least_one(**{name: getattr(self, name) for name in counts.split()})
        for name in ("seed", "preview_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 0")


def loaded(dataset: Dataset) -> Data:
    """What a dataset's load() answers. Raises ValueError where that is no Data, and as load() does."""
    data = dataset.load()
    if not isinstance(data, Data):
        raise ValueError(f"{type(dataset).__name__}.load() answered {_kind(data)}: a ddistill.config.Data is expected")
    return data


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def resolved(experiment: Experiment) -> Experiment:
    """The experiment in its teacher's process, where an imported teacher brings one.

    Before there is a folder it is the published one. Raises ValueError where the experiment names another process.
    """
    if not isinstance(experiment.network, Imported):
        return experiment
    published = None if experiment.network.folder.exists() else experiment.published
    process = experiment.network.process if published is None else published.process
    if experiment.process not in (process, edm()):
        raise ValueError(f"the teacher in {experiment.network.folder} brings its own process: leave process out")
    return dataclasses.replace(experiment, process=process)
