"""Adversarial diffusion distillation of Stable Diffusion XL in one to four steps (ADD, Sauer et al. 2023).

λ = 2.5, c(t) = α_t, hinge loss, R1 of 1e-5 on features, four times of the student, the first of them T, batch 128, 4 k
steps (sec. 4). Ours are the learning rate of 1e-5, the other times of 750, 500 and 250, the EMA of .999 and the
teacher's guidance of 7.5, none of which it gives. ADD's heads look at pictures through DINOv2; these look at latents
through the teacher, at x_t of a logit-normal law (1, 1), as LADD's do (Sauer et al. 2024, sec. 3).
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.losses.adversarial import Hinge
from ddistill.losses.times import LogNormal, Uniform
from ddistill.methods import ADD
from ddistill.methods.adversarial import Adversary
from ddistill.methods.discriminators import TeacherHeads


def experiment() -> Experiment:
    adversary = Adversary(network=TeacherHeads(vector=1280), loss=Hinge(), noise=LogNormal(1.0, 1.0), r1=1e-5, r2=0.0)
    return Experiment(
        name="sdxl_add",
        network=Imported(Path("teachers/stable-diffusion-xl-base-1.0"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/sdxl")),
        published=published.sdxl(),
        guidance=7.5,
        method=ADD(
            adversary, distill=2.5, times=Uniform(), steps=4, first=0.25, rate=1.0, ema=0.999,
            inner=(750.0, 500.0, 250.0),
        ),
        optimizer=Optimizer(learning_rate=1e-5, decay=False),
        steps=4000,
        batch_size=128,
        fsdp=16,
    )  # fmt: skip
