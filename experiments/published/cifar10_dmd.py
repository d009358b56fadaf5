"""Distribution matching of EDM on CIFAR-10 with labels: FID 2.13 in one step (DMD2, Yin et al. 2024b).

As NVlabs/FastGen ran it (1.99): AdamW at 1e-4 with decay .01 for all networks, the student in every fifth step,
adversarial weight 1e-3, batch 2048, 100 k steps. The heads look at the teacher's features, DMD2's at those of the fake
score.
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
    adversary = Adversary(network=heads, noise=KarrasRamp(), r1=0.0, r2=0.0)
    return Experiment(
        name="cifar10_dmd",
        network=Imported(Path("teachers/edm-cifar10-32x32-cond-vp")),
        data=ImageFolder(Path("data/cifar10"), size=32),
        published=published.edm_cifar10(),
        method=Together(
            DMD(fake=Auxiliary(stable=False), times=KarrasRamp(), every=5, rate=1.0, ema=0.9999),
            GAN(adversary, steps=1, first=1.0),
            weight=1e-3,
        ),
        optimizer=Optimizer(learning_rate=1e-4, warmup=0, decay=False, weight_decay=0.01),
        steps=100_000,
        batch_size=2048,
        checkpoint_every=5000,
    )
