"""2-RF of FLUX.1 dev with an adapter of rank 64, on prompts, and its distillation (Liu et al. 2022, alg. 1).

The teacher embeds its guidance, held at 1.5, as larger scales bend the way (InstaFlow, Liu et al. 2023, sec. 4).
Pairs by 25 steps are made batch by batch and never stored. AdamW at 1e-4 as LCM-LoRA has it; rank, batch and steps
are ours.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.integrators import dpmpp_2m
from ddistill.lora import LoRA
from ddistill.methods import Adapted, Reflow


def experiment() -> Experiment:
    reflow = Reflow(k=2, nodes=1, count=0, teacher_steps=25, flow_steps=25, integrator=dpmpp_2m)
    return Experiment(
        name="flux_reflow",
        network=Imported(Path("teachers/FLUX.1-dev"), bfloat16=True, remat=True, guidance=1.5),
        data=LatentFolder(Path("data/flux")),
        published=published.flux_dev(),
        method=Adapted(reflow, LoRA(rank=64, layers=("*_blocks.*.kernel",))),
        optimizer=Optimizer(learning_rate=1e-4, warmup=500, decay=False, weight_decay=0.01),
        steps=10_000,
        batch_size=32,
        fsdp=16,
    )
