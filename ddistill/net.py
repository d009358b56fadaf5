"""Net: every network seen as a denoiser x̂0 = E[x0 | x_t], its parameters data and its code a static pure function.

A raw network F is turned into a denoiser by a preconditioning, one linear map for each thing a network can be trained
to output:

    x̂0 = c_skip(t) x + c_out(t) F(c_in(t) x, c_noise(t), cond, s)                     (Karras et al. 2022, eq. 7)

A student is a Net that also reads s, the time it jumps to; `Net.jump` moves there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ddistill.gathering import Place, again, placed, rematerialises
from ddistill.process import LARGEST_RHO, Process, Time, expand, safe_divide

PyTree = Any


class Apply(Protocol):
    """The code of a Net: pure, and hashable by value so that equal networks share compilations."""

    def __call__(
        self, params: PyTree, rest: PyTree, x: Array, t: Array, cond: PyTree, *, s: Array | None, key: Array | None
    ) -> Array:
        """Estimate x0 from x at time t [B]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Net:
    """A denoiser as data: net(x, t, cond, s=s) estimates E[x0 | x_t = x], or a student's g(x, t, s).

    params: what an optimiser may touch. rest: buffers, or the frozen base under an adapter. apply: static code.
    """

    params: PyTree
    rest: PyTree
    apply: Apply = field(metadata={"static": True})

    def __call__(
        self, x: Array, t: Time, cond: PyTree = None, *, s: Time | None = None, key: Array | None = None
    ) -> Array:
        """Estimate x0: x [B, ...], t and s [] or [B], cond a pytree of [B, ...]; the result is [B, ...], x's dtype."""
        batch = x.shape[:1]
        t = jnp.broadcast_to(jnp.asarray(t, x.dtype), batch)
        s = None if s is None else jnp.broadcast_to(jnp.asarray(s, x.dtype), batch)
        return self.apply(self.params, self.rest, x, t, cond, s=s, key=key)

    def jump(
        self, process: Process, x: Array, t: Time, s: Time, cond: PyTree = None, *, key: Array | None = None
    ) -> Array:
        """G(x, t, s): where the student says the trajectory through (x, t) is at s. CTM's G, MeanFlow's x − (t−s) u."""
        return process.step(self(x, t, cond, s=s, key=key), x, t, s)

    def replace(self, **changes) -> "Net":
        """The same network with other params or rest."""
        return dataclasses.replace(self, **changes)

    def bind(self, cond: PyTree = None) -> Callable[[Array, Array], Array]:
        """This denoiser as a pytree function of (x, t) alone, the form that integrators take."""
        return jax.tree_util.Partial(_call_bound, self, cond)


def _call_bound(net: Net, cond: PyTree, x: Array, t: Array) -> Array:
    return net(x, t, cond)


def laid_out(net: Net, place: Place | None) -> Net:
    """The same network for programs on a mesh: its samples stay split, its parameters are gathered where it uses them.

    Networks that it holds, such as the teacher in a discriminator, likewise.
    """

    def inside(leaf):
        return laid_out(leaf, place) if isinstance(leaf, Net) else leaf

    rest = jax.tree.map(inside, net.rest, is_leaf=lambda leaf: isinstance(leaf, Net))
    return Net(net.params, rest, placed(net.apply, place))


def frozen(net: Net) -> Net:
    """The same network with stopped parameters; gradients still flow through its inputs."""
    return net.replace(params=jax.lax.stop_gradient(net.params))


class Preconditioning(Protocol):
    """Coefficients c_skip, c_out, c_in, c_noise at time t (shape of t) for a process; hashable by value."""

    def __call__(self, process: Process, t: Array) -> tuple[Array, Array, Array, Array]:
        """Answer (c_skip, c_out, c_in, c_noise)."""


def log_noise(process: Process, t: Array) -> Array:
    """¼ log ρ, EDM's c_noise, bounded so that it is finite where σ or α is 0."""
    return -0.25 * jnp.clip(process.half_log_snr(t), -math.log(LARGEST_RHO), 10.0)


@dataclass(frozen=True)
class EDMPrecondition:
    """Unit variance in and out for data of standard deviation σ_d, on any process (Karras et al. 2022, table 1).

    EDM's coefficients at ρ = σ/α on x/α, multiplied out so that they stay finite where α = 0.
    """

    sigma_data: float = 0.5
    time_scale: float = 1.0

    def __call__(self, process: Process, t: Array) -> tuple[Array, Array, Array, Array]:
        """Coefficients at t; c_skip = 1 and c_out = 0 at σ = 0, so the network is the identity on clean data."""
        alpha, sigma, sd = process.alpha(t), process.sigma(t), self.sigma_data
        norm2 = sigma**2 + (alpha * sd) ** 2
        c_noise = self.time_scale * log_noise(process, t)
        return alpha * sd**2 / norm2, sigma * sd / jnp.sqrt(norm2), 1 / jnp.sqrt(norm2), c_noise


@dataclass(frozen=True)
class BoundaryPrecondition:
    """EDM's with the identity moved from ρ = 0 to ρ(t_min): f(x, t_min) = x/α (Song et al. 2023, app. C)."""

    sigma_data: float = 0.5
    time_scale: float = 1.0

    def __call__(self, process: Process, t: Array) -> tuple[Array, Array, Array, Array]:
        """Coefficients at t; on a process with α = 1, c_skip = σ_d²/((σ−ε)² + σ_d²), c_out = σ_d (σ−ε)/√(σ² + σ_d²)."""
        alpha, sigma, sd = process.alpha(t), process.sigma(t), self.sigma_data
        above = sigma - alpha * process.rho(jnp.asarray(process.t_min, t.dtype))  # α (ρ − ρ_min)
        c_in = 1 / jnp.sqrt(sigma**2 + (alpha * sd) ** 2)
        c_noise = self.time_scale * log_noise(process, t)
        return alpha * sd**2 / (above**2 + (alpha * sd) ** 2), sd * above * c_in, c_in, c_noise


@dataclass(frozen=True)
class EpsPrecondition:
    """A network that outputs ε: x0 = (x − σ ε)/α. It sees time_scale · t + time_offset, t the process's own time.

    Networks of diffusers count their times from 0: time_offset = −1 on a discrete process.
    """

    time_scale: float = 1.0
    time_offset: float = 0.0

    def __call__(self, process: Process, t: Array) -> tuple[Array, Array, Array, Array]:
        """Coefficients at t; not finite where α = 0."""
        alpha = process.alpha(t)
        return 1 / alpha, -process.sigma(t) / alpha, jnp.ones_like(t), self.time_scale * t + self.time_offset


@dataclass(frozen=True)
class VPrecondition:
    """A network that outputs v = α ε − σ x0: x0 = (α x − σ v)/(α² + σ²)."""

    time_scale: float = 1.0
    time_offset: float = 0.0

    def __call__(self, process: Process, t: Array) -> tuple[Array, Array, Array, Array]:
        """Coefficients at t."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        norm2 = alpha**2 + sigma**2
        return alpha / norm2, -sigma / norm2, jnp.ones_like(t), self.time_scale * t + self.time_offset


@dataclass(frozen=True)
class VelocityPrecondition:
    """A network that outputs the flow's velocity u = α' x0 + σ' ε: x0 = (σ' x − σ u)/(α σ' − σ α')."""

    time_scale: float = 1.0

    def __call__(self, process: Process, t: Array) -> tuple[Array, Array, Array, Array]:
        """Coefficients at t."""
        d_alpha, d_sigma, sigma = process.alpha_prime(t), process.sigma_prime(t), process.sigma(t)
        delta = process.alpha(t) * d_sigma - sigma * d_alpha
        return safe_divide(d_sigma, delta), -safe_divide(sigma, delta), jnp.ones_like(t), self.time_scale * t


@dataclass(frozen=True)
class DataPrecondition:
    """A network that outputs x0 itself."""

    time_scale: float = 1.0
    time_offset: float = 0.0

    def __call__(self, process: Process, t: Array) -> tuple[Array, Array, Array, Array]:
        """Coefficients at t."""
        return jnp.zeros_like(t), jnp.ones_like(t), jnp.ones_like(t), self.time_scale * t + self.time_offset


@dataclass(frozen=True)
class _Preconditioned:
    definition: "Definition"
    process: Process
    precondition: Preconditioning

    def __call__(self, params, rest, x, t, cond, *, s, key):
        def denoised(params, rest, x, t, cond, s, key):
            out = self._raw(self.definition(params, rest), x, t, cond, s, key)
            c_skip, c_out, _, _ = (expand(c, x) for c in self.precondition(self.process, t))
            return c_skip * x + c_out * out.astype(x.dtype)

        place = self.definition.place
        if place is None:
            return denoised(params, rest, x, t, cond, s, key)
        kept = place.splits and not self.definition.rematerialises
        run = jax.checkpoint(denoised, policy=again) if kept else denoised
        x, t, cond, s = place.batch((x, t, cond, s))
        return place.batch(run(params, rest, x, t, cond, s, key))

    def outputs(self, params, rest, x, t, cond, *, s, key):
        """What each module answers on the way, by path; of several calls the last."""
        module = _unrolled(self.definition(params, rest))
        _, captured = self._raw(
            nnx.capture(module, nnx.Intermediate, method_outputs=nnx.Intermediate), x, t, cond, s, key
        )
        flat = nnx.to_flat_state(captured)
        return {".".join(map(str, path[:-1])): v.get_value()[-1] for path, v in flat if path[-1] == "__call__"}

    def _raw(self, module, x, t, cond, s, key):
        _, _, c_in, c_noise = (expand(c, x) for c in self.precondition(self.process, t))
        s_noise = None if s is None else self.precondition(self.process, s)[3]
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return module(c_in * x, c_noise.reshape(t.shape), cond, s_noise, rngs=rngs)


def _unrolled(module: nnx.Module) -> nnx.Module:
    """A module whose stacks of blocks, run by a scan that no outputs leave, have become lists of blocks."""
    for _, part in list(nnx.iter_modules(module)):
        for name, child in list(vars(part).items()):
            if hasattr(child, "unrolled"):
                setattr(part, name, child.unrolled())
    return module


@dataclass(frozen=True)
class _Names:
    """Names of the leaves of an NNX state, which nnx.merge would otherwise match by position alone."""

    names: tuple[str, ...]
    structure: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, state: nnx.State) -> tuple["_Names", dict[str, Array]]:
        named = {
            ".".join(str(getattr(k, "key", "")) for k in path).rstrip("."): leaf
            for path, leaf in jax.tree.leaves_with_path(state)
        }
        return cls(tuple(named), jax.tree.structure(state)), named

    def state(self, named: dict[str, Array]) -> nnx.State:
        return jax.tree.unflatten(self.structure, [named[name] for name in self.names])


@dataclass(frozen=True)
class Definition:
    """The code of an NNX module, hashable by value: definition(params, rest) is the module.

    place: where the arrays lie that it is given, so that its layers gather them.
    """

    graph: nnx.GraphDef
    params: _Names
    rest: _Names
    place: Place | None = None

    def __call__(self, params: dict[str, Array], rest: dict[str, Array]) -> nnx.Module:
        """The module with these arrays."""
        if self.place is None or not self.place.splits:
            return self._merged(params, rest)
        return self.place.gather_at_use(self._merged(self.place.stacks(params), self.place.stacks(rest)))

    @property
    def rematerialises(self) -> bool:
        """Whether its blocks keep nothing for the backward pass."""
        return _rematerialises(dataclasses.replace(self, place=None))

    def _merged(self, params: dict[str, Any], rest: dict[str, Any]) -> nnx.Module:
        return nnx.merge(self.graph, self.params.state(params), self.rest.state(rest))


@functools.lru_cache(maxsize=64)
def _rematerialises(definition: Definition) -> bool:
    nothing = (dict.fromkeys(names.names) for names in (definition.params, definition.rest))
    return rematerialises(definition._merged(*nothing))


def split(module: nnx.Module) -> tuple[dict[str, Array], dict[str, Array], Definition]:
    """An NNX module as params, rest (both flat dictionaries by path, "blocks.0.expand.kernel") and code."""
    graph, *states = nnx.split(module, nnx.Param, ...)
    (params_names, params), (rest_names, rest) = map(_Names.of, states)
    return params, rest, Definition(graph, params_names, rest_names)


def from_nnx(module: nnx.Module, process: Process, precondition: Preconditioning) -> Net:
    """A Net from an NNX module called as module(x, c_noise, cond, s_noise, rngs=rngs) -> F, of x's shape.

    The module is split once (`split`); from here on only jax transformations are used.
    Raises ValueError where the network's output does not determine x0, as ε where α = 0.
    """
    with jax.ensure_compile_time_eval():  # also where the network's shapes alone are asked for
        ends = jnp.asarray([process.t_min, process.t_max])
        if not np.all(np.isfinite(np.asarray(precondition(process, ends)[:2]))):
            bad = process.t_max if float(process.alpha(ends[1])) == 0 else process.t_min
            raise ValueError(
                f"{type(precondition).__name__} gives no x0 at t = {bad:g}, where alpha = "
                f"{float(process.alpha(bad)):g} and sigma = {float(process.sigma(bad)):g} (zero terminal SNR): train a "
                "v- or x0-prediction network instead (VPrecondition, DataPrecondition), or end the process before this "
                "time"
            )
    params, rest, definition = split(module)
    return Net(params, rest, _Preconditioned(definition, process, precondition))


def module_of(net: Net) -> tuple[Definition, Process, Preconditioning]:
    """The module of a network, and the process and preconditioning through which it is seen: `from_nnx` undone.

    Of a network carried to another process (`retime`) or held at a scale (`at_scale`) these are its own. Raises
    ValueError for one that is more than a module: guided, adapted, or two in one.
    """
    apply: Any = net.apply
    while isinstance(apply, _Retimed | _AtScale):
        apply = apply.apply
    if not isinstance(apply, _Preconditioned):
        raise ValueError(f"this network is {type(apply).__name__.strip('_')}, more than one module")
    return apply.definition, apply.process, apply.precondition


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled:
    """A condition together with a guidance scale w [B], for networks that embed w: students of guided teachers."""

    cond: PyTree
    w: Array


@dataclass(frozen=True)
class _Guided:
    apply: Apply
    interval: tuple[float, float]

    def __call__(self, params, rest, x, t, cond, *, s, key):
        if cond is None:
            raise ValueError("a guided network needs cond: guidance is the difference between cond and none")
        cond, scale = (cond, rest["w"]) if "w" in rest else _split_scale(cond)
        null = jax.tree.map(
            lambda n, c: jnp.broadcast_to(n, jnp.shape(c)).astype(jnp.result_type(c)), rest["null"], cond
        )

        def double(a, b):
            return jnp.concatenate([a, b])

        both = jax.tree.map(double, cond, null)
        twice = self.apply(
            params, rest["rest"], double(x, x), double(t, t), both, s=None if s is None else double(s, s), key=key
        )
        with_cond, without = jnp.split(twice, 2)
        low, high = self.interval
        w = expand(jnp.where((low <= t) & (t <= high), scale, 1.0).astype(x.dtype), x)
        return without + w * (with_cond - without)  # Ho & Salimans 2022 in Imagen's convention


def guided(net: Net, w: Array | float, null: PyTree, interval: tuple[float, float] = (0.0, math.inf)) -> Net:
    """Classifier-free guidance as a new teacher: D_∅ + w (D_c − D_∅), w = 1 being none, in one doubled forward pass.

    w: [] or [B], Imagen's and diffusers' convention (`to_extra_scale`). null: the condition that means none, of the
    structure of cond. Outside interval = (t_low, t_high) w is 1 (Kynkäänniemi et al. 2024).
    """
    rest = {"rest": net.rest, "w": jnp.asarray(w, jnp.float32), "null": jax.tree.map(jnp.asarray, null)}
    return Net(net.params, rest, _Guided(net.apply, interval))


def guided_by_condition(net: Net, null: PyTree = -1, interval: tuple[float, float] = (0.0, math.inf)) -> Net:
    """`guided` for conditions `Scaled(cond, w)`: every sample brings its own w, as the students of guidance take it.

    Raises ValueError, when called, for a condition without a scale.
    """
    rest = {"rest": net.rest, "null": jax.tree.map(jnp.asarray, null)}
    return Net(net.params, rest, _Guided(net.apply, interval))


def passes(net: Net) -> int:
    """Forward passes that one call of a network costs: 2 of one that `guided` made, 1 of any other."""
    return 2 if isinstance(net.apply, _Guided) else 1


def to_extra_scale(w: Array | float) -> Array | float:
    """w' = w − 1 of D_c + w' (D_c − D_∅), 0 being none (Ho & Salimans 2022, Meng et al. 2023, LCM), from Imagen's w.

    Imagen, diffusers' `guidance_scale` and this library write D_∅ + w (D_c − D_∅), 1 being none; 0 has no condition.
    """
    return w - 1


def from_extra_scale(w: Array | float) -> Array | float:
    """Imagen's w = w' + 1, this library's, from the w' of Meng et al. and of LCM: see `to_extra_scale`."""
    return w + 1


class ScaleLaw(Protocol):
    """How a guidance scale depends on time; a frozen dataclass."""

    def __call__(self, w: Array, t: Array) -> Array:
        """The scale at t, given the nominal one; w [] or [B], t [B] -> [B]."""


def noise_share(process: Process, t: Array) -> Array:
    """σ/(α + σ) in [0, 1], alike for all processes: t itself on rectified flow."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return sigma / (alpha + sigma)


def time_share(process: Process, t: Array) -> Array:
    """t/t_max."""
    return t / process.t_max


@dataclass(frozen=True)
class DynamicScale:
    """Dynamic guidance (Starodubcev et al. 2024, iCD): w where axis(t) ≤ low, none (1) from high on, linear in between.

    Full guidance where details are made and none where the noise hides the modes, so that it costs no diversity. The
    paper's axis on its discrete process is `time_share`; `noise_share` places low and high alike on every process.
    """

    process: Process
    low: float = 0.4
    high: float = 0.8
    axis: Callable[[Process, Array], Array] = noise_share

    def __post_init__(self):
        if not 0 <= self.low < self.high:
            raise ValueError(f"dynamic guidance falls from low to high, 0 <= low < high; given {self.low}, {self.high}")

    def __call__(self, w: Array, t: Array) -> Array:
        """1 + (w − 1) (high − u)/(high − low) for low ≤ u ≤ high, u = axis(t)."""
        left = (self.high - self.axis(self.process, t)) / (self.high - self.low)
        return 1 + (w - 1) * jnp.clip(left, 0.0, 1.0)


@dataclass(frozen=True)
class _Rescaled:
    apply: Apply
    law: ScaleLaw
    transparent = True

    def __call__(self, params, rest, x, t, cond, *, s, key):
        cond, w = _split_scale(cond)
        return self.apply(params, rest, x, t, Scaled(cond, self.law(w, t)), s=s, key=key)


def rescaled(net: Net, law: ScaleLaw) -> Net:
    """Guidance that changes with time: a network of `Scaled` conditions that sees law(w, t) for w.

    For teachers (`guided_by_condition`) under any integrator and for students that embed w, whose jump takes the scale
    at its start.
    """
    return Net(net.params, net.rest, _Rescaled(net.apply, law))


@dataclass(frozen=True)
class _AtScale:
    apply: Apply
    w: float
    transparent = True

    def __call__(self, params, rest, x, t, cond, *, s, key):
        w = jnp.full(x.shape[0], self.w, jnp.float32)
        return self.apply(params, rest, x, t, Scaled(cond, w), s=s, key=key)


def at_scale(net: Net, w: float) -> Net:
    """A network that embeds a guidance scale (FLUX.1 dev) at one scale of it, as a network of plain conditions."""
    return Net(net.params, net.rest, _AtScale(net.apply, w))


def _split_scale(cond: PyTree) -> tuple[PyTree, Array]:
    if not isinstance(cond, Scaled):
        raise ValueError(
            f"this network takes its guidance scale with the condition, Scaled(cond, w); given {type(cond).__name__}"
        )
    return cond.cond, jnp.asarray(cond.w)


@dataclass(frozen=True)
class _TwoWay:
    down: Apply
    up: Apply

    def __call__(self, params, rest, x, t, cond, *, s, key):
        if s is None:
            raise ValueError("a two-way network must know the time s it jumps to")

        def go(apply, way):
            return lambda x: apply(params[way], rest[way], x, t, cond, s=s, key=key)

        return jax.lax.cond(s[0] > t[0], go(self.up, "up"), go(self.down, "down"), x)


def two_way(down: Net, up: Net) -> Net:
    """Two students as one: `down` jumps to less noise, `up` to more. All samples of a call must go the same way."""
    params, rest = {"down": down.params, "up": up.params}, {"down": down.rest, "up": up.rest}
    return Net(params, rest, _TwoWay(down.apply, up.apply))


@dataclass(frozen=True)
class _Diagonal:
    apply: Apply
    transparent = True

    def __call__(self, params, rest, x, t, cond, *, s, key):
        del s
        return self.apply(params, rest, x, t, cond, s=t, key=key)


def diagonal(net: Net) -> Net:
    """A student as the teacher it holds: g(x, t, t) = E[x0 | x_t = x], for any integrator (Kim et al. 2024, sec. 3)."""
    return Net(net.params, net.rest, _Diagonal(net.apply))


@dataclass(frozen=True)
class _Retimed:
    apply: Apply
    source: Process
    target: Process
    transparent = True

    def __call__(self, params, rest, x, t, cond, *, s, key):
        there, scale = self._move(t)
        s_there = None if s is None else self._move(s)[0]
        return self.apply(params, rest, expand(scale, x) * x, there, cond, s=s_there, key=key)

    def _move(self, t):
        rho_time = self.source.time_of(self.target.half_log_snr(t))
        there = jnp.clip(rho_time, 0.0, self.source.t_max)
        alpha, sigma = self.target.alpha(t), self.target.sigma(t)
        by_noise = sigma > alpha  # both quotients are equal where ρ is; each is defined at one end
        scale = jnp.where(
            by_noise,
            self.source.sigma(there) / jnp.where(by_noise, sigma, 1.0),
            self.source.alpha(there) / jnp.where(by_noise, 1.0, alpha),
        )
        return there, scale


def retime(net: Net, source: Process, target: Process) -> Net:
    """A teacher of process `source` as a teacher of process `target`: D²(x, t) = D¹(x α¹/α², t¹) where ρ¹(t¹) = ρ²(t).

    Exact wherever the two processes share noise-to-signal ratios; beyond the source's range the noise is matched at its
    end, σ¹(t_max) ε for σ² ε.
    """
    return Net(net.params, net.rest, _Retimed(net.apply, source, target))
