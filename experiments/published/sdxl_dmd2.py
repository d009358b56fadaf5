"""Distribution matching of SDXL in four steps, with backward simulation: FID 19.3 (DMD2, Yin et al. 2024b, sec. 4.4).

tianweiy/DMD2: steps from t = 999, 749, 499, 249 (here counted from 1), the teacher guided at 8, AdamW at 5e-7 with
decay .01, its warm-up of 500/64 steps on 64 GPUs, clipped at 10, batch 128, 19 k steps, no EMA, the student in every
fifth step, adversarial weight 5e-3; times uniform on [.02, .98] of the discrete process, for fake scores and the
adversary on all of it. The student learns from its own samples, renoised as when it is sampled; here the adversary's
come from renoised data, and its heads look at the teacher's middle features, DMD2's at those of the fake score. Their
LoRA, at 5e-5, is method=Adapted(..., LoRA(rank=64, alpha=8, layers=LAYERS), networks=("student",)), with LAYERS of
sdxl_lcm_lora.py.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.losses.times import Uniform
from ddistill.losses.weightings import EpsWeight
from ddistill.methods import DMD, GAN, Together
from ddistill.methods.adversarial import Adversary
from ddistill.methods.discriminators import TeacherHeads
from ddistill.methods.fake_scores import Auxiliary

INNER = (750.0, 500.0, 250.0)


def experiment() -> Experiment:
    heads = TeacherHeads(layers=("mid_block.resnets.1",), vector=1280)
    adversary = Adversary(network=heads, noise=Uniform(), r1=0.0, r2=0.0)
    fake = Auxiliary(times=Uniform(), weighting=EpsWeight(), stable=False)
    return Experiment(
        name="sdxl_dmd2",
        network=Imported(Path("teachers/stable-diffusion-xl-base-1.0"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/sdxl")),
        published=published.sdxl(),
        guidance=8.0,
        method=Together(
            DMD(fake=fake, times=Uniform(0.02, 0.98), every=5, rate=1.0, steps=4, ema=0.0, inner=INNER),
            GAN(adversary, steps=4, first=0.25, inner=INNER),
            weight=5e-3,
        ),
        optimizer=Optimizer(learning_rate=5e-7, warmup=8, decay=False, weight_decay=0.01, clip=10.0),
        steps=19_000,
        batch_size=128,
        fsdp=16,
    )
