"""The table of methods, name -> method."""

from collections.abc import Callable
from dataclasses import dataclass

from ddistill.methods.add import ADD
from ddistill.methods.adversarial import Adversary
from ddistill.methods.base import Made, Method, Round
from ddistill.methods.consistency import Consistency
from ddistill.methods.consistency_training import ConsistencyTraining
from ddistill.methods.ctm import CTM, ctm_with_adversary
from ddistill.methods.denoising import Denoising
from ddistill.methods.dmd import DMD, dmd_multi_sample, dmd_with_regression
from ddistill.methods.fake_scores import Auxiliary, Delta, MultiSample
from ddistill.methods.gan import GAN
from ddistill.methods.guidance import GuidanceDistillation
from ddistill.methods.invertible import Invertible
from ddistill.methods.kd import KD
from ddistill.methods.lcm import LatentConsistency
from ddistill.methods.lora import Adapted
from ddistill.methods.multistep import MultistepConsistency
from ddistill.methods.phased import PhasedConsistency
from ddistill.methods.progressive import Progressive
from ddistill.methods.rectified_flow import FlowConsistency, RectifiedFlow, Reflow
from ddistill.methods.sds import SDS, particles, sds_gradient
from ddistill.methods.together import Together
from ddistill.process import Process


@dataclass(frozen=True)
class Entry:
    """A method of the table: its configuration (called with a process it gives a Method or Rounds), and its source.

    steps: the numbers of sampling steps that the benchmark judges. guided: the student takes a guidance scale.
    effort: how many times the usual number of training steps it takes, in few dimensions and in many (`bench.exact`).
    """

    make: Callable[..., Callable[[Process], Made]]
    title: str
    paper: str
    steps: tuple[int, ...] = (1, 2, 4, 8)
    guided: bool = False
    effort: tuple[float, float] = (1.0, 1.0)

    @property
    def file(self) -> str:
        """The file that holds it, from the root of the repository."""
        return self.make.__module__.replace(".", "/") + ".py"


METHODS = {
    "kd": Entry(KD, "Naive knowledge distillation", "Luhman & Luhman 2021, arXiv:2101.02388"),
    "progressive": Entry(Progressive, "Progressive distillation", "Salimans & Ho 2022, arXiv:2202.00512"),
    "guidance": Entry(
        GuidanceDistillation, "Distillation of guidance, then progressive", "Meng et al. 2023, arXiv:2210.03142",
        guided=True,
    ),
    "lcm": Entry(LatentConsistency, "Latent consistency", "Luo et al. 2023, arXiv:2310.04378", guided=True),
    "rectified_flow": Entry(
        RectifiedFlow, "Rectified flow (1-RF)", "Liu et al. 2022, arXiv:2209.03003", (1, 2, 4, 8, 64)
    ),
    "reflow": Entry(Reflow, "Reflow, distilled", "Liu et al. 2022, arXiv:2209.03003", effort=(2.0, 2.0)),
    "flow_consistency": Entry(FlowConsistency, "Consistency on a flow", "Song et al. 2023, arXiv:2303.01469"),
    "consistency": Entry(Consistency, "Consistency distillation", "Song et al. 2023, arXiv:2303.01469"),
    "consistency_training": Entry(
        ConsistencyTraining, "Consistency training", "Song & Dhariwal 2023, arXiv:2310.14189"
    ),
    "multistep": Entry(MultistepConsistency, "Multistep consistency", "Heek et al. 2024, arXiv:2403.06807"),
    "phased": Entry(PhasedConsistency, "Phased consistency", "Wang et al. 2024, arXiv:2405.18407"),
    "ctm": Entry(CTM, "Consistency trajectory models", "Kim et al. 2024, arXiv:2310.02279", (1, 2, 4, 8, 16)),
    "invertible": Entry(Invertible, "Invertible consistency", "Starodubcev et al. 2024, arXiv:2406.14539"),
    # On digits, 64 dimensions, longer training drops modes: recall .96 after 4000 steps, .48 after 10 000.
    "dmd": Entry(DMD, "Distribution matching", "Yin et al. 2024, arXiv:2405.14867", (1,), effort=(4.0, 1.0)),
    "dmd_regression": Entry(
        dmd_with_regression, "Distribution matching with regression", "Yin et al. 2024, arXiv:2311.18828", (1,)
    ),
    "dmd_multi_sample": Entry(
        dmd_multi_sample, "Distribution matching by the samples' own score", "Xu et al. 2023, arXiv:2302.00670", (1,)
    ),
    "sds": Entry(SDS, "Score distillation", "Poole et al. 2023, arXiv:2209.14988", (1,)),
    # In two dimensions a short training leaves modes with the wrong weights: on unseen-2d.npz sw2 .34, and .21 so long.
    "add": Entry(
        ADD, "Adversarial diffusion distillation", "Sauer et al. 2023, arXiv:2311.17042", (1, 2, 4), effort=(2.5, 1.0)
    ),
    "ctm_gan": Entry(
        ctm_with_adversary, "Consistency trajectories with an adversary", "Kim et al. 2024, arXiv:2310.02279",
        (1, 2, 4, 8, 16),
    ),
    "lora": Entry(Adapted, "Consistency with low-rank students", "Luo et al. 2023, arXiv:2311.05556"),
}  # fmt: skip
"""Methods that make a student, by their name on the command line."""

__all__ = [
    "ADD",
    "CTM",
    "DMD",
    "GAN",
    "KD",
    "METHODS",
    "SDS",
    "Adapted",
    "Adversary",
    "Auxiliary",
    "Consistency",
    "ConsistencyTraining",
    "Delta",
    "Denoising",
    "Entry",
    "FlowConsistency",
    "GuidanceDistillation",
    "Invertible",
    "LatentConsistency",
    "Method",
    "MultiSample",
    "MultistepConsistency",
    "PhasedConsistency",
    "Progressive",
    "RectifiedFlow",
    "Reflow",
    "Round",
    "Together",
    "particles",
    "sds_gradient",
]
