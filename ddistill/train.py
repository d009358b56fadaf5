"""The train step: any number of networks, one optax transformation each, in one jitted and sharded function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from ddistill import sharding
from ddistill.gathering import Place
from ddistill.methods.base import UNKNOWN, Batch, Method, Metrics, Progress, Space
from ddistill.methods.sharing import Nets
from ddistill.net import Net, laid_out

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that changes while training, and all that a checkpoint holds.

    The key of a step is fold_in(key, step): a resumed run equals an uninterrupted one.
    """

    step: Array
    key: Array
    params: dict[str, PyTree]
    opt: dict[str, optax.ApplyIfFiniteState]
    ema: dict[str, PyTree]
    memory: dict[str, PyTree] = field(default_factory=dict)

    def skipped(self) -> Array:
        """Updates that were skipped because loss or gradient were not finite."""
        return sum((opt.total_notfinite for opt in self.opt.values()), jnp.zeros((), jnp.int32))

    def failing(self) -> Array:
        """The most updates on end that one network has had skipped up to now."""
        return jnp.stack([opt.notfinite_count for opt in self.opt.values()]).max()


@dataclass(frozen=True)
class Trainer:
    """A method bound to optimisers and a mesh. Make one with `make_trainer`.

    start(teacher, key, space) -> the networks to be trained. init(nets, key, space) -> State; space may be left out
    where no network and no memory depends on it. begin(teacher, key, space) -> (networks without params, State): both
    in one program, with nothing ever whole on one device. step(state, nets, batch, turn, steps=1, round=0) -> (State,
    metrics): compiled once for each distinct turn; donates state; `nets` are the networks whose params the state does
    not hold, the teacher above all, and the code and buffers of those it does; steps and round are what the losses see
    in their `Progress`. several(state, nets, batches, turns, which, count, steps=1, round=0): the same for `count`
    steps in one call, on batches stacked along a new first axis, of which number i updates turns[which[i]]; each
    network's metrics are its last. Compiled once for each number of stacked batches and set of turns, for any count.
    """

    method: Method
    mesh: Mesh
    rule: sharding.Rule
    start: Callable[..., dict[str, Net]]
    init: Callable[..., State]
    begin: Callable[..., tuple[dict[str, Net], State]]
    step: Callable[..., tuple[State, Metrics]]
    several: Callable[..., tuple[State, Metrics]]


def make_trainer(
    method: Method,
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    mesh: Mesh | None = None,
    rule: sharding.Rule = sharding.Rule(),  # noqa: B008
    accumulate: int = 1,
    draw: int = 0,
) -> Trainer:
    """Bind a method to one optimiser for each of its networks.

    rule: how parameters, and what is shaped like them, lie on the mesh. accumulate: gradients are averaged over this
    many equal parts of each batch before the update. Steps whose gradient is not finite change nothing but a counter.
    draw: another one gives every step other random numbers.
    Raises ValueError if an optimiser is missing or superfluous.
    """
    if set(optimizers) != set(method.losses):
        raise ValueError(f"optimizers for {sorted(optimizers)}, but the method trains {sorted(method.losses)}")
    mesh = sharding.make_mesh() if mesh is None else mesh
    never = np.iinfo(np.int32).max
    rated = {n: optax.chain(o, optax.scale(method.rate[n])) if n in method.rate else o for n, o in optimizers.items()}
    place = Place(mesh, rule) if mesh.size > 1 else None
    guarded = {n: optax.apply_if_finite(o, max_consecutive_errors=never) for n, o in rated.items()}

    def start(teacher: Net, key: Array, space: Space = UNKNOWN) -> dict[str, Net]:
        names = sorted(method.init)
        return {n: method.init[n](teacher, jax.random.fold_in(key, i), space) for i, n in enumerate(names)}

    def build(nets: Mapping[str, Net], key: Array, space: Space) -> State:
        def copy(tree: PyTree) -> PyTree:
            return jax.tree.map(jnp.array, tree)  # donated states must not share buffers with the teacher

        params = {n: copy(nets[n].params) for n in method.losses}
        return State(
            step=jnp.zeros((), jnp.int32),
            key=jnp.array(key),
            params=params,
            opt={n: guarded[n].init(p) for n, p in params.items()},
            ema={n: copy(nets[source].params) for n, (source, _) in method.ema.items()},
            memory={n: memory.init(nets, space) for n, memory in method.memory.items()},
        )

    def init(nets: Mapping[str, Net], key: Array, space: Space = UNKNOWN) -> State:
        return sharding.created(mesh, lambda nets, key: build(nets, key, space), nets, key, rule=rule)

    def begin(teacher: Net, key: Array, space: Space = UNKNOWN) -> tuple[dict[str, Net], State]:
        def both(teacher, key, finish=build):
            k_nets, k_state = jax.random.split(key)
            nets = start(teacher, k_nets, space)
            return {n: net.replace(params=None) for n, net in nets.items()}, finish(nets, k_state, space)

        if mesh.size == 1:  # step by step, to the bit as networks are made without a mesh
            return both(teacher, key, init)
        return sharding.created(mesh, both, teacher, key, rule=rule)

    def step(
        state: State, nets: Mapping[str, Net], batch: Batch, turn: tuple[str, ...], progress: Progress
    ) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, draw) if draw else state.key, state.step)
        current = dict(nets)
        for name in method.losses:
            current[name] = nets[name].replace(params=state.params[name])
        for name, (source, _) in method.ema.items():
            current[name] = nets[source].replace(params=state.ema[name])
        current = {name: laid_out(net, place) for name, net in current.items()}
        params, opt, ema = dict(state.params), dict(state.opt), dict(state.ema)

        def losses(trained, part, key):
            total, info, made = jnp.zeros(()), dict[str, Array](), dict[Any, Any]()
            for name in (name for name in method.losses if name in turn):
                # Each is differentiated by its own network alone, so that the gradient of the sum is that of each.
                seen = Nets({**current, name: current[name].replace(params=trained[name])}, name, made)
                value, more = method.losses[name](seen, {**part, **state.memory}, progress, key)
                total += value
                info |= {f"{name}/{k}": v for k, v in {"loss": value, **more}.items()}
            return total, info

        gradients, info = _gradient(losses, {n: state.params[n] for n in turn}, batch, key, accumulate)
        metrics: dict[str, Array] = dict(info)
        for name, gradient in gradients.items():
            updates, opt[name] = guarded[name].update(gradient, state.opt[name], state.params[name])
            params[name] = optax.apply_updates(state.params[name], updates)
            metrics[f"{name}/grad_norm"] = optax.tree.norm(gradient)
        for name, (source, decay) in method.ema.items():
            if source in turn:
                kept = decay(progress) if callable(decay) else decay
                new = optax.incremental_update(params[source], state.ema[name], 1 - kept)
                ema[name] = _where(opt[source].last_finite, new, state.ema[name])

        seen = {**batch, **state.memory}
        memory = {n: m.update(state.memory[n], current, seen, progress, key) for n, m in method.memory.items()}
        sound = jnp.all(jnp.asarray([opt[n].last_finite for n in turn], bool))
        memory = _where(sound, memory, dict(state.memory))
        after = State(state.step + 1, state.key, params, opt, ema, memory)
        return after, metrics | {"skipped": after.skipped(), "failing": after.failing()}

    def pinned(state, nets, batch, turn, steps=1, round=0):
        state, metrics = step(state, nets, batch, turn, Progress(state.step, steps, round))
        return jax.lax.with_sharding_constraint(state, sharding.state_shardings(mesh, state, rule)), metrics

    def several(state, nets, batches, turns, which, count, steps=1, round=0):
        def one(turn, state, metrics, batch):
            state, new = pinned(state, nets, batch, turn, steps, round)
            return state, metrics | {name: jax.lax.convert_element_type(v, v.dtype) for name, v in new.items()}

        def body(i, carry):
            batch = jax.tree.map(lambda a: a[i], batches)
            return jax.lax.switch(which[i], [partial(one, turn) for turn in turns], *carry, batch)

        batch = jax.tree.map(lambda a: a[0], batches)
        shapes: dict[str, Any] = {}
        for turn in turns:
            shapes |= jax.eval_shape(partial(one, turn), state, {}, batch)[1]
        metrics = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        return jax.lax.fori_loop(0, count, body, (state, metrics))

    return Trainer(
        method, mesh, rule, start, init, begin,
        jax.jit(pinned, static_argnums=3, donate_argnums=0),
        jax.jit(several, static_argnums=3, donate_argnums=0),
    )  # fmt: skip


def _where(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _gradient(loss, params, batch, key, parts):
    """Gradient and metrics of loss(params, batch, key), averaged over equal parts of the batch."""

    def one(part, key):
        return jax.grad(loss, has_aux=True)(params, part, key)

    if parts == 1:
        return one(batch, key)
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if any(size % parts for size in sizes):
        raise ValueError(f"accumulate = {parts} does not divide the batch of {sorted(sizes)}")
    # Strided parts, so that each keeps an equal share of every device's samples.
    split = jax.tree.map(lambda a: a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1), batch)

    def body(total, i):
        part = jax.tree.map(lambda a: a[i], split)
        return jax.tree.map(jnp.add, total, one(part, jax.random.fold_in(key, i))), None

    first = jax.eval_shape(one, jax.tree.map(lambda a: a[0], split), key)
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
    total, _ = jax.lax.scan(body, zero, jnp.arange(parts))
    return jax.tree.map(lambda a: a / parts, total)
