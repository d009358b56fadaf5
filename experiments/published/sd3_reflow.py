"""2-RF of Stable Diffusion 3 medium on prompts, and its distillation to one step: InstaFlow's recipe (Liu et al. 2023).

Pairs by 25 steps of DPM-Solver++ from the teacher at guidance 1.5, as larger scales bend the way (InstaFlow, sec. 4),
an ℓ2 loss on velocities, then on x0 at t = 1; here made batch by batch and never stored, for the prompts of the data.
InstaFlow distils SD 1.5 and with LPIPS; learning rate, batch and steps are ours.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.integrators import dpmpp_2m
from ddistill.methods import Reflow


def experiment() -> Experiment:
    return Experiment(
        name="sd3_reflow",
        network=Imported(Path("teachers/stable-diffusion-3-medium"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/sd3")),
        published=published.sd3_medium(),
        guidance=1.5,
        method=Reflow(k=2, nodes=1, count=0, teacher_steps=25, flow_steps=25, integrator=dpmpp_2m),
        optimizer=Optimizer(learning_rate=1e-5, warmup=500, decay=False, weight_decay=0.01),
        steps=50_000,
        batch_size=64,
        fsdp=8,
    )
