"""Any method with low-rank students: few weights are trained, and each round ends with plain networks."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.lora import LoRA, adapt, merge
from ddistill.methods.base import Init, Made, Method, Space
from ddistill.methods.consistency import Consistency
from ddistill.net import Net
from ddistill.process import Process


@dataclass(frozen=True)
class Adapted:
    """A method's configuration whose networks train an adapter: `Adapted(Consistency(), LoRA(rank=8))`.

    networks: as in `with_lora`. Losses that name a parameter see the adapter's: CTM's adaptive weight wants
    last_layer="outward.kernel.up".
    """

    method: Callable[[Process], Made] = field(default_factory=Consistency)
    lora: LoRA = field(default_factory=LoRA)
    networks: tuple[str, ...] | None = None

    def __call__(self, process: Process) -> Made:
        """The method on a process."""
        return with_lora(self.method(process), self.lora, self.networks)


def with_lora(made: Made, lora: LoRA, networks: tuple[str, ...] | None = None) -> Made:
    """The method, or rounds, whose networks train an adapter on what they start from, and are merged at the end.

    networks: the names of those that do; by default all that start with parameters of the teacher's paths and shapes,
    so that discriminators are trained whole. A student has its teacher's structure again after every round, and the
    next round adapts it anew: r rounds at rank k change it by a rank of r k. Rounds that shared a method still do.
    Raises ValueError for a name that is not trained.
    """
    if isinstance(made, Method):
        return _with_lora(made, lora, networks)
    methods = {id(part.method): part.method for part in made}
    adapted = {i: _with_lora(method, lora, networks) for i, method in methods.items()}
    return tuple(dataclasses.replace(part, method=adapted[id(part.method)]) for part in made)


def _with_lora(method: Method, lora: LoRA, networks: tuple[str, ...] | None) -> Method:
    unknown = sorted(set(networks or ()) - set(method.init))
    if unknown:
        raise ValueError(f"networks names {unknown}, but the method trains {sorted(method.init)}")

    def started(name: str, init: Init) -> Init:
        def start(teacher: Net, key: Array, space: Space) -> Net:
            k_net, k_lora = jax.random.split(key)
            net = init(teacher, k_net, space)
            chosen = name in networks if networks is not None else _alike(net, teacher)
            return adapt(net, lora, k_lora) if chosen else net

        return start

    return dataclasses.replace(
        method,
        init={name: started(name, init) for name, init in method.init.items()},
        finish=lambda net: method.finish(merge(net)),
    )


def _alike(a: Net, b: Net) -> bool:
    def shapes(net):
        return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(net.params)}

    return shapes(a) == shapes(b)
