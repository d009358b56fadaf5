"""Consistency trajectories of EDM on ImageNet 64 × 64 (Kim et al. 2024): 1.92 in one step with its adversary.

Table 4 and sony/ctm: N = 40, soft gaps, Heun, RAdam at 4e-4 without warm-up, batch 1440, target EMA .999, no dropout,
DSM with its adaptive weight by the last block's second convolution. Its 40 nodes end at .002, its gaps are up to 39
intervals; here a 40th interval leads from there to 0, and gaps are up to 40. It takes a Heun step for each interval of
a gap, which a whole batch shares; here each gap has 39. This is the part without the adversary, whose networks are
trained on ImageNet; the distance is ℓ2 for LPIPS. steps: 30 k, ours, of the 10 to 50 k that it recommends.
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
        name="imagenet64_ctm",
        network=Imported(Path("teachers/edm-imagenet-64x64-cond-adm"), bfloat16=True, remat=True, dropout=0.0),
        data=ImageFolder(Path("data/imagenet/train"), size=64, enlarge=True),
        published=published.edm_imagenet64(),
        method=CTM(
            gap=(0.0, 1.0),
            intervals=40,
            between=False,
            final=0.0,
            solver=heun,
            solver_steps=39,
            distance=L2(),
            weighted=False,
            target_ema=0.999,
            dsm=None,
            exact=False,
            last_layer="dec.64x64_block3.conv1.kernel",
            ema=0.999,
        ),
        optimizer=Optimizer(learning_rate=4e-4, warmup=0, decay=False, rectified=True),
        steps=30_000,
        batch_size=1440,
        checkpoint_every=1000,
    )
