"""2-RF of SiT-XL/2 on ImageNet 256 × 256 by rf++: U-shaped times, and its pairs made batch by batch (Lee et al. 2024).

rf++ on ImageNet 64 × 64 (sec. 5, sangyun884/rfpp): Adam at 1e-4, warm-up of 2500 steps, batch 2048, 700 k steps, EMA
.9999, times ∝ e^{4u} + e^{4(1−u)}, a pseudo-Huber velocity loss weighted by 1 − t, pairs by Heun; here 40 Euler-type
steps of a multistep solver for each batch, at SiT's guidance of 1.5, and no LPIPS, which latents do not have.
`ddistill pairs` makes the pairs once instead, for --data PairsData.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.integrators import dpmpp_2m
from ddistill.losses.distances import PseudoHuber
from ddistill.losses.times import UShaped
from ddistill.methods import RectifiedFlow, Reflow
from ddistill.methods.rectified_flow import AlphaWeight


def experiment() -> Experiment:
    velocity = RectifiedFlow(
        times=UShaped(), distance=PseudoHuber(scale=0.00054, power=1.0), weighting=AlphaWeight(), rate=1.0, ema=0.9999
    )
    return Experiment(
        name="imagenet256_sit_reflow",
        network=Imported(Path("teachers/SiT-XL-2-256"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/imagenet256")),
        published=published.sit_xl_2(),
        guidance=1.5,
        method=Reflow(k=2, nodes=0, regression=velocity, count=0, teacher_steps=40, integrator=dpmpp_2m),
        optimizer=Optimizer(learning_rate=1e-4, warmup=2500, decay=False),
        steps=700_000,
        batch_size=2048,
        fsdp=8,
        checkpoint_every=5000,
    )
