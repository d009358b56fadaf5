"""Distribution matching of EDM on ImageNet 64 × 64: FID 1.51 in one step (DMD2, Yin et al. 2024b, table 1).

tianweiy/DMD2: AdamW at 2e-6 with decay .01, its warm-up of 500/7 steps on 7 GPUs, gradients clipped at 10, batch 280,
200 k steps, no dropout and no EMA, the student in every fifth step, adversarial weight 3e-3, times of [.02, .98] of
Karras' ramp; fake scores and the adversary are trained on all of it. Its discriminator is a head on the fake score's
features and learns with it in one AdamW, at a loss weight of 1e-2; here heads look at the teacher's, with an AdamW of
their own, and real and fake samples share t and ε.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import ImageFolder
from ddistill.losses.times import KarrasRamp
from ddistill.methods import DMD, GAN, Together
from ddistill.methods.adversarial import Adversary
from ddistill.methods.discriminators import TeacherHeads
from ddistill.methods.fake_scores import Auxiliary


def experiment() -> Experiment:
    heads = TeacherHeads(layers=("dec.8x8_in1",))
    adversary = Adversary(network=heads, noise=KarrasRamp(0.0, 1.0), r1=0.0, r2=0.0)
    return Experiment(
        name="imagenet64_dmd",
        network=Imported(Path("teachers/edm-imagenet-64x64-cond-adm"), bfloat16=True, remat=True, dropout=0.0),
        data=ImageFolder(Path("data/imagenet/train"), size=64, enlarge=True),
        published=published.edm_imagenet64(),
        method=Together(
            DMD(fake=Auxiliary(stable=False), times=KarrasRamp(), every=5, rate=1.0, ema=0.0),
            GAN(adversary, steps=1, first=1.0),
            weight=3e-3,
        ),
        optimizer=Optimizer(learning_rate=2e-6, warmup=71, decay=False, weight_decay=0.01, clip=10.0),
        steps=200_000,
        batch_size=280,
        checkpoint_every=5000,
    )
