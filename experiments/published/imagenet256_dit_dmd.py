"""Distribution matching of DiT-XL/2 on ImageNet 256 × 256 in one step, by the recipe of DMD2 (Yin et al. 2024b).

Optimiser, ratio of updates, adversarial weight and steps are those of its ImageNet 64 × 64
(experiments/published/imagenet64_dmd.py), times uniform on the discrete process as in its text-to-image: [.02, .98] of
it for the student, all for the fake score. Ours are the batch, the EMA, the teacher's guidance of 1.5 (that of Peebles
& Xie 2022, table 4, who guide three of the four channels; here all) and the adversary's look: at the features of all
blocks, at times of a logit-normal law (1, 1), as in LADD. Nobody published numbers for it.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.losses.times import LogNormal, Uniform
from ddistill.methods import DMD, GAN, Together
from ddistill.methods.adversarial import Adversary
from ddistill.methods.discriminators import TeacherHeads
from ddistill.methods.fake_scores import Auxiliary


def experiment() -> Experiment:
    adversary = Adversary(network=TeacherHeads(), noise=LogNormal(1.0, 1.0), r1=0.0, r2=0.0)
    fake = Auxiliary(times=Uniform(), stable=False)
    return Experiment(
        name="imagenet256_dit_dmd",
        network=Imported(Path("teachers/DiT-XL-2-256"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/imagenet256")),
        published=published.dit_xl_2(),
        guidance=1.5,
        method=Together(
            DMD(fake=fake, times=Uniform(0.02, 0.98), every=5, rate=1.0, ema=0.999),
            GAN(adversary, steps=1, first=1.0),
            weight=3e-3,
        ),
        optimizer=Optimizer(learning_rate=2e-6, warmup=71, decay=False, weight_decay=0.01, clip=10.0),
        steps=200_000,
        batch_size=256,
        fsdp=8,
        checkpoint_every=5000,
    )
