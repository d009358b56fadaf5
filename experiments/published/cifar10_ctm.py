"""Consistency trajectories of EDM on CIFAR-10 with labels (Kim et al. 2024): 1.73 in one step with its adversary.

Table 4 and Kim-Dongjun/ctm-cifar10: N = 18, soft gaps, Heun, RAdam at 4e-4 without warm-up, batch 256, 100 k steps,
target EMA .999, DSM with its adaptive weight by the last layer, and the teacher's dropout of .13, which its student
keeps. Its 18 nodes end at .002; here an 18th interval leads from there to 0, and gaps are up to 18. It takes a Heun
step for each interval of a gap, which a whole batch shares; here each gap has 17. Without the adversary (5.19 on the
unconditional data), whose networks are trained on ImageNet; the distance is ℓ2 for LPIPS.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import ImageFolder
from ddistill.integrators import heun
from ddistill.losses.distances import L2
from ddistill.methods import CTM


def experiment() -> Experiment:
    return Experiment(
        name="cifar10_ctm",
        network=Imported(Path("teachers/edm-cifar10-32x32-cond-vp"), dropout=0.13),
        data=ImageFolder(Path("data/cifar10"), size=32),
        published=published.edm_cifar10(),
        method=CTM(
            gap=(0.0, 1.0),
            intervals=18,
            between=False,
            final=0.0,
            solver=heun,
            solver_steps=17,
            distance=L2(),
            weighted=False,
            target_ema=0.999,
            dsm=None,
            exact=False,
            last_layer="dec.32x32_aux_conv.kernel",
            ema=0.999,
        ),
        optimizer=Optimizer(learning_rate=4e-4, warmup=0, decay=False, rectified=True),
        steps=100_000,
        batch_size=256,
        checkpoint_every=5000,
    )
