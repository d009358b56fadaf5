"""Latent consistency models: consistency distillation straight from the guided teacher (Luo et al. 2023)."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ddistill.integrators import dpmpp_3s
from ddistill.losses.distances import Distance, PseudoHuber
from ddistill.methods.base import Made
from ddistill.methods.consistency import Consistency
from ddistill.methods.guidance import Scales, with_guidance
from ddistill.process import Process


@dataclass(frozen=True)
class LatentConsistency:
    """E λ d(f_θ(x_{n+k}, w, c, t_{n+k}), f_θ⁻(x_n^w, w, c, t_n)), x_n^w the guided teacher's step of k nodes (eq. 14).

    It is `Consistency` under `with_guidance`: one student for all w of `scales` (Imagen's w, the paper's plus 1). A
    training step skips k = `skip` nodes of a fine grid of `nodes` intervals (sec. 4.3), here as one of nodes/skip
    intervals of Karras' grid that begins anywhere; the paper's nodes are uniform in t. λ = 1/(ρ_{n+k} − ρ_n) where
    `weighted`, otherwise 1 as in the paper. solver: takes solver_steps steps over the k nodes; the paper takes one of
    `ddim`, whose error at strong guidance the student keeps.
    """

    nodes: int = 1000
    skip: int = 50
    solver: Callable = dpmpp_3s
    solver_steps: int = 1
    distance: Distance = field(default_factory=PseudoHuber)
    weighted: bool = True
    target_ema: float = 0.0
    ema: float = 0.99
    scales: Scales = field(default_factory=Scales)
    null: int = -1

    def __post_init__(self):
        if not 1 <= self.skip <= self.nodes // 2 or self.nodes % self.skip:
            raise ValueError(f"skip = {self.skip} must divide nodes = {self.nodes} into two intervals or more")

    def __call__(self, process: Process) -> Made:
        """The method on a process."""
        n = self.nodes // self.skip
        consistency = Consistency(
            intervals=n, max_intervals=n, solver=self.solver, solver_steps=self.solver_steps, between=True,
            distance=self.distance, weighted=self.weighted, target_ema=self.target_ema, ema=self.ema,
        )  # fmt: skip
        return with_guidance(consistency(process), self.scales, self.null)
