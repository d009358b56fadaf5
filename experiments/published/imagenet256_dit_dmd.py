"""Distribution matching of DiT-XL/2 on ImageNet 256 × 256 in one step, by the recipe of DMD2 (Yin et al. 2024b).

Settings are those of its ImageNet 64 × 64 (experiments/published/imagenet64_dmd.py), the teacher guided at 1.5
(Peebles & Xie 2022, table 4), heads on the features of all its blocks as in LADD. Nobody published numbers for it.
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
            DMD(fake=fake, times=Uniform(), every=5, rate=1.0, ema=0.999),
            GAN(adversary, steps=1, first=1.0),
            weight=3e-3,
        ),
        optimizer=Optimizer(learning_rate=2e-6, warmup=500, decay=False, weight_decay=0.01, clip=10.0),
        steps=200_000,
        batch_size=256,
        fsdp=8,
        checkpoint_every=5000,
    )
