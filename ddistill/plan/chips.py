"""Accelerators as their makers publish them, and pods of them by name."""

import math
import re
from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator: rates at their published peaks, which no program reaches.

    flops: of dense bfloat16 products with float32 sums, per second. tf32: of float32 products at JAX's default
    precision, whose operands a TPU rounds to bfloat16 and a GPU to TF32. highest: of float32 products at the precision
    "highest". memory: bytes. usable: bytes of it that a program gets. bandwidth: of the memory, bytes per second.
    links: what a chip can receive from the others of its pod or node, bytes per second. source: where this is from.
    """

    name: str
    kind: Literal["tpu", "gpu"]
    flops: float
    tf32: float
    highest: float
    memory: float
    usable: float
    bandwidth: float
    links: float
    source: str


def _tpu(name: str, tera: float, memory: float, usable: float, bandwidth: float, links: float, source: str) -> Chip:
    # Six bfloat16 products make one of float32 at "highest" precision.
    flops = tera * 1e12
    return Chip(name, "tpu", flops, flops, flops / 6, memory, usable, bandwidth * 1e9, links * 1e9, source)


def _gpu(name: str, tera: tuple[float, float, float], memory: float, bandwidth: float, links: float, source: str):
    # What drivers, the CUDA context and cuDNN's workspaces take differs by version: a tenth is left to them.
    flops, tf32, highest = (t * 1e12 for t in tera)
    usable = 0.9 * memory * 1e9
    return Chip(name, "gpu", flops, tf32, highest, memory * 1e9, usable, bandwidth * 1e9, links * 1e9, source)


_TPU = "cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275, 32 * GIB, 30.75 * GIB, 1200, 300, f"{_TPU}v4; links: Jouppi et al. 2023, table 4, 6 × 50 GB/s"),
        _tpu("v5e", 197, 16 * GIB, 15.75 * GIB, 819, 200, f"{_TPU}v5e; half of its 400 GB/s in both directions"),
        _tpu("v5p", 459, 95 * GIB, 95.74 * GIB, 2765, 600, f"{_TPU}v5p; half of its 1200 GB/s in both directions"),
        _tpu("v6e", 918, 32 * GIB, 31.25 * GIB, 1638, 400, f"{_TPU}v6e; half of its 800 GB/s in both directions"),
        _gpu("a100-80", (312, 156, 19.5), 80, 2039, 300, "NVIDIA A100 datasheet, SXM4; half of NVLink's 600 GB/s"),
        _gpu(
            "h100", (989.4, 494.7, 66.9), 80, 3350, 450, "NVIDIA H100 datasheet, SXM5, dense; half of NVLink's 900 GB/s"
        ),
        _gpu(
            "h200", (989.4, 494.7, 66.9), 141, 4800, 450, "NVIDIA H200 datasheet, SXM, dense; half of NVLink's 900 GB/s"
        ),
        _gpu(
            "b200", (2250, 1100, 80), 180, 8000, 900, "NVIDIA HGX B200, DGX B200 datasheets; half of NVLink's 1.8 TB/s"
        ),
    )
}
"""Chips by name. usable of TPUs: what libtpu's compiler allows a program, by its message for one that is too large."""


@dataclass(frozen=True)
class Pod:
    """So many chips of one kind, and the topology's name for the compiler, such as "v5e:16x16"."""

    chip: Chip
    chips: int
    topology: str


def pod(topology: str) -> Pod:
    """The pod of a name: CHIP:SHAPE for TPUs, as "v5e:16x16" or "v5p:4x4x8", and CHIP:COUNT for GPUs, as "h100:8".

    Raises ValueError for other words, unknown chips, and shapes of as many axes as the chip's network does not have.
    """
    match = re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+)*)", topology.strip().lower())
    form = "CHIP:SHAPE, such as v5e:16x16 or v5p:4x4x8, or CHIP:COUNT of GPUs, such as h100:8"
    if match is None:
        raise ValueError(f"topology {topology!r}: give {form}")
    name, shape = match.groups()
    if name not in CHIPS:
        raise ValueError(f"topology {topology!r}: no chip {name!r}; known are {', '.join(CHIPS)}")
    chip, sides = CHIPS[name], [int(n) for n in shape.split("x")]
    axes = {"gpu": 1, "v5e": 2, "v6e": 2}.get(chip.kind if chip.kind == "gpu" else name, 3)
    if min(sides) < 1:
        raise ValueError(f"topology {topology!r}: at least 1 chip is needed along each axis")
    if len(sides) != axes:
        example = {1: "8", 2: "4x4", 3: "4x4x4"}[axes]
        raise ValueError(f"topology {topology!r}: {name} has {axes} axes, as in {name}:{example}")
    return Pod(chip, math.prod(sides), f"{name}:{shape}")
