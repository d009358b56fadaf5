"""What several losses of a step need is computed once."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from ddistill.net import Net


class Nets(dict[str, Net]):
    """The networks that a loss sees, by name; `learner` is the one whose loss it is, `made` what `once` keeps."""

    def __init__(self, nets: Mapping[str, Net], learner: str, made: dict[Any, Any]):
        super().__init__(nets)
        self.learner, self.made = learner, made


def exchanged(nets: Mapping[str, Net], **others: Net) -> Mapping[str, Net]:
    """The same with other networks, for what a loss is wrapped in."""
    changed = {**nets, **others}
    return Nets(changed, nets.learner, nets.made) if isinstance(nets, Nets) else changed


def derived(nets: Mapping[str, Net], key: Array, make: Callable[[], Any]) -> Any:
    """make(), keys made of a key: for all losses of a step the same objects, by which `once` knows them."""
    if not isinstance(nets, Nets):
        return make()
    at = "key", id(key), make.__code__
    if at not in nets.made:
        nets.made[at] = key, make()
    return nets.made[at][1]


def once(nets: Mapping[str, Net], of: str, key: Array, make: Callable[[], Any]) -> Any:
    """make(), a pytree that the network `of` computes with the key: once for all losses of a step.

    make: a function of one place in the code, which several losses reach; two methods in one step make other things of
    the same key. The loss of that network, the first of a method's, differentiates it; the others see its value.
    Compilers find such work done twice where it is written the same way twice, but not across the scans of networks of
    stacked blocks.
    """
    if not isinstance(nets, Nets):
        return make()
    at = of, id(key), make.__code__  # the key is kept, and so is its number
    if nets.learner == of:
        nets.made[at] = key, make()
        return nets.made[at][1]
    return jax.tree.map(jax.lax.stop_gradient, nets.made[at][1]) if at in nets.made else make()
