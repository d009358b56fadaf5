"""Sets of features on all devices in double precision, a block of rows at a time: what distances and kernels run on.

Every process holds the whole sets and gets the whole answer; the rows of a block are shared out among all devices of
all of them. Double precision is JAX's own, in a local scope, so that ties and small differences come out alike however
many devices there are.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddistill import sharding

BYTES = 2**28
"""What the distances of one block may take on a device."""


def rows_at_once(columns: int, devices: int, limit: int = BYTES) -> int:
    """Rows of a block, a multiple of the devices, whose float64 distances to so many columns stay below the limit."""
    return devices * max(1, limit // (8 * max(1, columns)))


def in_blocks(
    function: Callable[..., Any], x: np.ndarray, *whole: Any, columns: int, limit: int = BYTES, **static: Any
) -> Any:
    """function(blocks [n, rows, d], own [n, rows], *whole, **static) in float64, jitted; leaves as NumPy's arrays.

    x: [N, d], filled up with zeros to whole blocks. own: the numbers of the rows, −1 for those that fill up. whole:
    arrays that every device holds, and numbers. Rows lie on all devices, and the function should go through blocks with
    a scan. columns: of the distances that it takes.
    """
    mesh = sharding.make_mesh()
    rows = min(rows_at_once(columns, mesh.size, limit), -(-len(x) // mesh.size) * mesh.size)
    count = -(-len(x) // rows)
    filled = np.zeros((count * rows, x.shape[1]), np.float64)
    filled[: len(x)] = x
    own = np.full(count * rows, -1, np.int64)
    own[: len(x)] = np.arange(len(x))
    split = PartitionSpec(None, *sharding.batch_sharding(mesh).spec)
    with jax.enable_x64(True):
        blocks = _put(mesh, split, filled.reshape(count, rows, -1)), _put(mesh, split, own.reshape(count, rows))
        copies = [_put(mesh, PartitionSpec(), np.asarray(w)) for w in whole]
        answer = _compiled(function, mesh, tuple(static.items()))(*blocks, *copies)
        return jax.tree.map(np.asarray, answer)


@functools.lru_cache(maxsize=32)
def _compiled(function: Callable[..., Any], mesh: Mesh, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(function, **dict(static)), out_shardings=sharding.replicated(mesh))


def _put(mesh: Mesh, spec: PartitionSpec, x: np.ndarray) -> Array:
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def distance2(a: Array, b: Array) -> Array:
    """Squared Euclidean distances [N, M] of a [N, d] and b [M, d], off by about 1e-16 of their squared lengths."""
    product = jnp.matmul(a, b.T, precision="highest")
    return jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1) - 2 * product
