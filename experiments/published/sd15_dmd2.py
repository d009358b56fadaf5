"""Distribution matching of Stable Diffusion 1.5 in one step: FID 9.28 on COCO-30k, the first of DMD2's two stages.

tianweiy/DMD2 (Yin et al. 2024b): the teacher guided at 1.75, AdamW at 1e-5 with decay .01, its warm-up of 500/64 steps
on 64 GPUs, clipped at 10, the student in every tenth step, batch 2048, 39 k steps, no EMA, no adversary; times uniform
on [.02, .98] of the discrete process, for fake scores on all of it. The second stage goes on from student and fake
score for 2 k steps at 5e-7, with an adversary of weight 1e-3 as in sdxl_dmd2.py: table 5's 8.35. It is not here.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.losses.times import Uniform
from ddistill.losses.weightings import EpsWeight
from ddistill.methods import DMD
from ddistill.methods.fake_scores import Auxiliary


def experiment() -> Experiment:
    fake = Auxiliary(times=Uniform(), weighting=EpsWeight(), stable=False)
    return Experiment(
        name="sd15_dmd2",
        network=Imported(Path("teachers/stable-diffusion-v1-5"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/sd15")),
        published=published.sd15(),
        guidance=1.75,
        method=DMD(fake=fake, times=Uniform(0.02, 0.98), every=10, rate=1.0, ema=0.0),
        optimizer=Optimizer(learning_rate=1e-5, warmup=8, decay=False, weight_decay=0.01, clip=10.0),
        steps=39_000,
        batch_size=2048,
        fsdp=8,
    )
