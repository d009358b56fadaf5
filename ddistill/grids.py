"""Time grids: the nodes at which samplers evaluate networks, descending from the noise to the data.

Every grid of n intervals is a float64 array [n + 1] with exact ends, strictly decreasing. Continuous grids take their
ends from the process (t_max, t_min) unless told otherwise; grids in the noise-to-signal ratio ρ = σ/α or in λ = −log ρ
are mapped back by the process, so they serve every process. Grids of a discrete process are given in its own time,
diffusers' timestep index plus one, with 0 the data.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddistill.process import LARGEST_RHO, DiscreteVP, Process, flow_shift


def karras(
    process: Process,
    n: int,
    rho: float = 7.0,
    final: float | None = 0.0,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Nodes uniform in ρ^{1/rho} from start to end, then `final` (Karras et al. 2022, eq. 5).

    Returns [n + 1] times: n of them from start (t_max) to end (t_min), then final, by default the data; for n = 1 start
    and final. With final=None all n + 1 lie from start to end, the training grid of consistency models.
    Raises ValueError for n < 1, rho ≤ 0, or an end of zero ρ. Where ρ is infinite at the start the ramp begins at
    ρ = 1000.
    """
    _positive(rho, "rho")

    def ramp(u, high, low):
        return ((1 - u) * high ** (1 / rho) + u * low ** (1 / rho)) ** rho

    return _by_rho(process, n, ramp, final, start, end)


def poly_exponential(
    process: Process,
    n: int,
    rho: float = 1.0,
    final: float | None = 0.0,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Nodes ρ_end (ρ_start/ρ_end)^(r^rho) in ρ, r from 1 to 0, then `final`, as `karras` (k-diffusion)."""
    _positive(rho, "rho")

    def ramp(u, high, low):
        return np.exp((1 - u) ** rho * (np.log(high) - np.log(low)) + np.log(low))

    return _by_rho(process, n, ramp, final, start, end)


def exponential(
    process: Process,
    n: int,
    final: float | None = 0.0,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Nodes uniform in λ = −log ρ, then `final`: the limit rho → ∞ of `karras`; arguments as there."""
    return poly_exponential(process, n, 1.0, final, start, end)


def log_snr_uniform(process: Process, n: int, start: float | None = None, end: float | None = None) -> np.ndarray:
    """n intervals of equal length in λ from start to end, without a final node (Lu et al. 2022, sec. 3.4)."""
    return exponential(process, n, None, start, end)


def uniform(process: Process, n: int, start: float | None = None, end: float = 0.0) -> np.ndarray:
    """Nodes uniform in t from start (t_max) to end, by default the data; score_sde stops at end=process.t_min."""
    start, end = _ends(process, n, start, end)
    return _exact(np.linspace(start, end, n + 1), start, end)


def quadratic(process: Process, n: int, start: float | None = None, end: float = 0.0) -> np.ndarray:
    """Nodes uniform in √t from start (t_max) to end, by default the data (Song et al. 2021, DDIM, app. D.2)."""
    start, end = _ends(process, n, start, end)
    return _exact(np.linspace(math.sqrt(start), math.sqrt(end), n + 1) ** 2, start, end)


def leading(process: Process, n: int, offset: int = 0) -> np.ndarray:
    """Diffusers' "leading" indices 0, T//n, 2(T//n), … + offset (Stable Diffusion: 1), as times, then 0.

    T is the number of steps of the discrete process. Raises ValueError for other processes, n outside 1 … T, or an
    offset that carries the first node beyond T.
    """
    steps = _steps(process, n)
    index = np.arange(n)[::-1] * (steps // n) + offset
    if offset < 0 or index[0] >= steps:
        raise ValueError(f"offset {offset} with {n} nodes reaches index {index[0]} of 0 … {steps - 1}: choose another")
    return _from_index(index)


def linspace(process: Process, n: int) -> np.ndarray:
    """Diffusers' "linspace" indices from T − 1 to 0, rounded, as times, then 0; raises as `leading`."""
    return _from_index(np.linspace(0, _steps(process, n) - 1, n).round()[::-1])


def trailing(process: Process, n: int) -> np.ndarray:
    """Diffusers' "trailing" indices round(T − kT/n) − 1, as times, then 0 (Lin et al. 2024); raises as `leading`.

    It always begins at T, as a process with zero terminal SNR needs.
    """
    steps = _steps(process, n)
    return _from_index(np.round(steps - np.arange(n) * (steps / n)) - 1)


def lcm(process: Process, n: int, origin: int = 50) -> np.ndarray:
    """n of the `origin` training nodes k, 2k, …, k = T//origin, then 0 (latent consistency models, Luo et al. 2023).

    Raises ValueError unless 1 ≤ n ≤ origin ≤ T.
    """
    steps = _steps(process, origin, "origin")
    _count(n, origin)
    nodes = (np.arange(1, origin + 1) * (steps // origin) - 1)[::-1]
    return _from_index(nodes[np.floor(np.linspace(0, origin, n, endpoint=False)).astype(int)])


def tcd(process: Process, n: int, origin: int = 50) -> np.ndarray:
    """The nodes of trajectory consistency distillation (Zheng et al. 2024): those of `lcm`, see `tcd_targets`."""
    return lcm(process, n, origin)


def tcd_targets(grid: np.ndarray, eta: float) -> np.ndarray:
    """Times [n] to which a TCD student jumps before noise brings it up to grid[1:], index ⌊(1 − η) index'⌋.

    eta in [0, 1]: 0 jumps to the next node itself, 1 to index 0; a node 0 (the data) stays 0.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is outside [0, 1]")
    following = np.asarray(grid, np.float64)[1:]
    return np.where(following > 0, np.floor((1 - eta) * (following - 1)) + 1, 0.0)


def flow_shifted(n: int, shift: float) -> np.ndarray:
    """Rectified-flow times 1 … 0, uniform and then shifted towards the noise by `shift` > 0 (SD3, eq. 23).

    The shift is applied once. diffusers' FlowMatchEuler applies it to its training σ and again to the nodes it makes
    itself, whose last is above 0; with sigmas given (1, 1 − 1/n, …), as Flux does, it agrees with this grid.
    """
    _count(n)
    _positive(shift, "shift")
    plain: Any = np.linspace(1.0, 0.0, n + 1)
    return _exact(np.asarray(flow_shift(plain, shift)), 1.0, 0.0)


def trig(n: int, start: float = math.pi / 2, middle: float | None = 1.3) -> np.ndarray:
    """TrigFlow angles from start to 0: uniform, and for n = 2 through `middle` (sCM, Lu & Song 2024; 1.1 on images)."""
    _count(n)
    if n == 2 and middle is not None:
        return _checked(np.array([start, middle, 0.0]))
    return _checked(np.linspace(start, 0.0, n + 1))


def dyadic(n: int) -> np.ndarray:
    """Times 1, 1 − d, …, 0 with d = 1/n and n a power of two, exact in floats (shortcut models, Frans et al. 2024)."""
    _count(n)
    if n & (n - 1):
        raise ValueError(f"n = {n} is not a power of two: shortcut models step by d = 1, 1/2, 1/4, …")
    return np.arange(n, -1, -1) / n


def _by_rho(process, n, ramp, final, start, end):
    start, end = _ends(process, n, start, process.t_min if end is None else end)
    append = final is not None and final < end
    with jax.ensure_compile_time_eval():  # nodes stay concrete when a grid is made inside jit
        high, low = (float(process.rho(jnp.asarray(t))) for t in (start, end))
        if not low > 0:
            raise ValueError(
                f"noise-to-signal ratio is {low:g} at end {end:g}: a grid in ρ needs it above 0, so give an end above 0"
            )
        high = high if math.isfinite(high) else LARGEST_RHO  # the first node is `start` itself all the same
        inner = n - 1 if append else n
        rho = ramp(np.linspace(0.0, 1.0, inner + 1) if inner else np.zeros(1), high, low)
        nodes = np.asarray(process.time_of(-np.log(rho)), np.float64)
    nodes = _exact(nodes, start, end if inner else start)
    return _checked(np.append(nodes, final)) if append else nodes


def _ends(process: Process, n: int, start: float | None, end: float) -> tuple[float, float]:
    _count(n)
    start = process.t_max if start is None else start
    process.check_times([start, end], "end of the grid")
    if start <= end:
        raise ValueError(f"the grid would start at {start:g} and end at {end:g}: start must be the noisier time")
    return float(start), float(end)


def _exact(nodes: np.ndarray, start: float, end: float) -> np.ndarray:
    nodes = np.array(nodes, np.float64)
    nodes[-1], nodes[0] = end, start
    return _checked(nodes)


def _checked(nodes: np.ndarray) -> np.ndarray:
    if not np.all(np.diff(nodes) < 0):
        raise ValueError(f"nodes do not decrease strictly: {nodes}; use fewer or other ends")
    return nodes


def _steps(process: Process, n: int, what: str = "n") -> int:
    if not isinstance(process.schedule, DiscreteVP):
        raise ValueError(f"this grid needs a discrete process, given {type(process.schedule).__name__}")
    _count(n, len(process.schedule.betas), what)
    return len(process.schedule.betas)


def _from_index(index: np.ndarray) -> np.ndarray:
    return _checked(np.append(index.astype(np.float64) + 1, 0.0))


def _count(n: int, most: int | None = None, what: str = "n") -> None:
    if isinstance(n, bool) or n != int(n) or n < 1 or (most is not None and n > most):
        raise ValueError(f"{what} = {n} must be a whole number of steps, from 1{f' to {most}' if most else ' on'}")


def _positive(value: float, what: str) -> None:
    if not value > 0:
        raise ValueError(f"{what} = {value} must be above 0")
