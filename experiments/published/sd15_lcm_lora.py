"""LCM-LoRA of Stable Diffusion 1.5, for 4 steps: 67.3 M parameters (Luo et al. 2023, "LCM-LoRA"; 67.5 in its table 1).

Rank 64 on attention, feed-forward, convolutions and time projections, AdamW at 1e-4 with decay .01, clipped at 1, one
DDIM step over 1/50 of the grid, pseudo-Huber with c = .001 in each coordinate, the student itself as its target, no
EMA (diffusers' example with --loss_type huber). The teacher's scale is 7.5 in the paper's convention, 8.5 in Imagen's;
the example draws one of 5 to 15, in the paper's, for each sample, which is not done for prompts here. Nodes lie on
Karras' grid, the paper's evenly in time; batch and steps are ours.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.integrators import ddim
from ddistill.lora import LoRA
from ddistill.losses.distances import CoordinateHuber
from ddistill.methods import Adapted, Consistency

LAYERS = (
    *("*.to_q.kernel", "*.to_k.kernel", "*.to_v.kernel", "*.to_out.0.kernel", "*.proj_in.kernel", "*.proj_out.kernel"),
    *("*.ff.net.0.proj.kernel", "*.ff.net.2.kernel", "*.conv1.kernel", "*.conv2.kernel", "*.conv_shortcut.kernel"),
    *("*.downsamplers.0.conv.kernel", "*.upsamplers.0.conv.kernel", "*.time_emb_proj.kernel"),
)


def experiment() -> Experiment:
    consistency = Consistency(
        intervals=50, max_intervals=50, solver=ddim, distance=CoordinateHuber(), weighted=False, ema=0.0
    )
    return Experiment(
        name="sd15_lcm_lora",
        network=Imported(Path("teachers/stable-diffusion-v1-5"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/sd15")),
        published=published.sd15(),
        guidance=8.5,
        method=Adapted(consistency, LoRA(rank=64, layers=LAYERS)),
        optimizer=Optimizer(learning_rate=1e-4, warmup=500, decay=False, weight_decay=0.01, clip=1.0),
        steps=20_000,
        batch_size=128,
    )
