"""Distribution matching of EDM on CIFAR-10 with labels, in one step: FID 1.99 as NVlabs/FastGen ran DMD2 on it.

DMD2's own code (Yin et al. 2024b) has no CIFAR-10; 2.13 is FastGen's column of papers. Its settings: AdamW at 1e-4 with
decay .01 for all networks, no dropout, the student in every fifth step and clipped at 10, all times on [.002, .998] of
Karras' ramp, heads on the teacher's features at the ends of its encoder's levels, adversarial weight 1e-3, batch 2048,
100 k steps, EMA .9999 (one of three). Otherwise than there, the fake score and the heads are clipped too and learn in
the student's step as well, real and fake samples share t and ε, t is drawn anew for each loss, and the heads are ours.
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
    heads = TeacherHeads(layers=tuple(f"enc.{side}x{side}_block3" for side in (32, 16, 8)))
    times = KarrasRamp(0.002, 0.998)
    adversary = Adversary(network=heads, noise=times, r1=0.0, r2=0.0)
    return Experiment(
        name="cifar10_dmd",
        network=Imported(Path("teachers/edm-cifar10-32x32-cond-vp"), dropout=0.0),
        data=ImageFolder(Path("data/cifar10"), size=32),
        published=published.edm_cifar10(),
        method=Together(
            DMD(fake=Auxiliary(times=times, stable=False), times=times, every=5, rate=1.0, ema=0.9999),
            GAN(adversary, steps=1, first=1.0),
            weight=1e-3,
        ),
        optimizer=Optimizer(learning_rate=1e-4, warmup=0, decay=False, weight_decay=0.01, clip=10.0),
        steps=100_000,
        batch_size=2048,
        checkpoint_every=5000,
    )
