"""Distribution matching of Stable Diffusion 1.5 in one step: FID 8.35 on COCO-30k (DMD2, Yin et al. 2024b, table 5).

tianweiy/DMD2: the teacher guided at 1.75, AdamW at 1e-5 with decay .01, clipped at 10, the student in every tenth step,
adversarial weight 1e-3. Times are uniform on the discrete process. The heads look at the teacher's middle features,
DMD2's at those of the fake score; batch and steps are ours.
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


def experiment() -> Experiment:
    heads = TeacherHeads(layers=("mid_block.resnets.1",))
    adversary = Adversary(network=heads, noise=Uniform(), r1=0.0, r2=0.0)
    fake = Auxiliary(times=Uniform(), weighting=EpsWeight(), stable=False)
    return Experiment(
        name="sd15_dmd2",
        network=Imported(Path("teachers/stable-diffusion-v1-5"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/sd15")),
        published=published.sd15(),
        guidance=1.75,
        method=Together(
            DMD(fake=fake, times=Uniform(), every=10, rate=1.0, ema=0.999),
            GAN(adversary, steps=1, first=1.0),
            weight=1e-3,
        ),
        optimizer=Optimizer(learning_rate=1e-5, warmup=500, decay=False, weight_decay=0.01, clip=10.0),
        steps=40_000,
        batch_size=256,
        fsdp=8,
    )
