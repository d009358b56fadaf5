"""Speed of the networks beside diffusers' in PyTorch, on the same machine in one run, as ratios.

    python experiments/bench/networks.py                        # small networks on one CPU core, float32
    python experiments/bench/networks.py --device gpu --json rows.json

Each network is built twice from one configuration, runs forward, and forward and backward by all parameters; calls of
all contenders take turns, and the fastest call of each counts. On a CPU, pinned to one core, a call's time is the
process's CPU time, which other processes on the machine disturb least; on a GPU it is the clock's. Ratios are ours over
PyTorch's, eager and compiled: below 1 ours is faster. Where diffusers is not installed, or has no such network, only
ours is timed.

FLOPs are counted, not measured: those of the matrix products and convolutions of our forward pass, from its jaxpr, a
scanned block as often as it runs; forward and backward count as three times that. The share of the matrix rate is
FLOPs over time over the rate of one large matrix product of the same dtype, measured in the same run.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """A network's options and its input: images [batch, side, side, channels], texts of `tokens` states."""

    options: Options
    batch: int
    side: int
    tokens: int = 0


@dataclass(frozen=True)
class Case:
    """A network of ours, diffusers' class of it, and the sizes for a CPU core and for a GPU.

    condition: "labels", "text" or None. channels: of the images.
    """

    module: str
    name: str
    theirs: str | None
    cpu: Size
    gpu: Size
    condition: str | None = "text"
    channels: int = 4


SMALL_UNET = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
CIFAR = {
    "block_out_channels": (128, 256, 256, 256), "attention_head_dim": None, "norm_eps": 1e-6, "freq_shift": 1,
    "flip_sin_to_cos": False, "downsample_padding": 0,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
DIT = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 4, "patch_size": 2, "sample_size": 32}
DIT_XL = {"num_attention_heads": 16, "attention_head_dim": 72, "out_channels": 8, "patch_size": 2}
PIXART = {"cross_attention_dim": 384, "caption_channels": 64, "use_additional_conditions": False}
JOINT = {"joint_attention_dim": 64, "pooled_projection_dim": 64}
SD3_SMALL = {"num_layers": 4, "num_attention_heads": 6, "caption_projection_dim": 384, "in_channels": 16, **JOINT}
SD3_MEDIUM = {"num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
FLUX_SMALL = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 3, **JOINT}

CASES = (
    Case("dit", "DiT", "DiTTransformer2DModel", Size(DIT, 4, 32), Size({**DIT_XL, "num_layers": 12}, 64, 32), "labels"),
    Case(
        "unet", "UNet2D", "UNet2DModel",
        Size({**SMALL_UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
              "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}, 4, 32),
        Size(CIFAR, 128, 32), None, 3,
    ),
    Case(
        "unet", "UNet2DCondition", "UNet2DConditionModel",
        Size({**SMALL_UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4,
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 64}, 4, 32, 16),
        Size({"cross_attention_dim": 768}, 8, 64, 77),
    ),
    Case(
        "pixart", "PixArt", "PixArtTransformer2DModel", Size({**DIT, **PIXART}, 4, 32, 16),
        Size({"num_layers": 12, "caption_channels": 4096, "use_additional_conditions": False}, 4, 128, 300),
    ),
    Case(
        "sana", "Sana", "SanaTransformer2DModel",
        Size({"num_attention_heads": 12, "num_layers": 2, "num_cross_attention_heads": 4,
              "cross_attention_head_dim": 96, "cross_attention_dim": 384, "caption_channels": 64}, 4, 16, 16),
        Size({"num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
              "cross_attention_dim": 1152, "num_layers": 8}, 16, 32, 300),
        channels=32,
    ),
    Case(
        "sd3", "SD3", "SD3Transformer2DModel", Size(SD3_SMALL, 2, 32, 16),
        Size({**SD3_MEDIUM, "num_layers": 6}, 4, 128, 333), channels=16,
    ),
    Case(
        "flux", "Flux", "FluxTransformer2DModel", Size(FLUX_SMALL, 2, 32, 16),
        Size({"num_layers": 2, "num_single_layers": 4}, 2, 128, 512), channels=16,
    ),
    Case(
        "edm", "SongUNet", None,
        Size({"img_resolution": 32, "model_channels": 32, "num_blocks": 1, "dropout": 0.0}, 4, 32),
        Size({"img_resolution": 32, "dropout": 0.0}, 128, 32), None, 3,
    ),
)  # fmt: skip
"""On the GPU widths, heads and tokens are those of DiT-XL/2 at 256 × 256 pixels, DDPM on CIFAR-10, Stable Diffusion
1.5, PixArt-α and Sana at 1024, SD3 medium and FLUX.1 at 1024, EDM's DDPM++; transformers of fewer equal blocks."""


@dataclass
class Row:
    """What was measured of one network: seconds, FLOPs, and per contender "ours", "eager", "compiled"."""

    network: str
    parameters: int
    input: tuple[int, ...]
    tokens: int
    flops: float
    forward: dict[str, float] = field(default_factory=dict)
    both: dict[str, float] = field(default_factory=dict)
    first_call: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Measure, print a table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--networks", default=",".join(c.name for c in CASES), help="names, with commas")
    parser.add_argument("--against", default="eager,compiled", help='eager, compiled, both, or "" for none')
    parser.add_argument("--rounds", type=int, default=5, help="calls of each contender")
    parser.add_argument("--json", help="file for the rows")
    given = parser.parse_args()
    names = given.networks.split(",")
    unknown = sorted(set(names) - {c.name for c in CASES})
    if unknown:
        parser.error(f"no networks {unknown}; there are {[c.name for c in CASES]}")
    against = [name for name in given.against.split(",") if name]
    if others := sorted(set(against) - {"eager", "compiled"}):
        parser.error(f"--against: no {', '.join(others)}; there are eager and compiled")
    prepare(given.device)

    rate = matrix_rate(given.device)
    about = {"device": _device_name(given.device), "dtype": _dtype(given.device), "matrix_flops_per_second": rate}
    print(f"{about['device']}, {about['dtype']}, matrix products at {rate / 1e12:.3g} TFLOP/s", flush=True)
    print(HEAD, flush=True)
    rows = []
    for case in CASES:
        if case.name not in names:
            continue
        rows.append(measure(case, given.device, against, given.rounds))
        print(line(rows[-1], rate), flush=True)
        if given.json:
            with open(given.json, "w", encoding="utf-8") as file:
                json.dump({**about, "rows": [asdict(row) for row in rows]}, file, indent=1)


def prepare(device: str, threads: int = 1) -> None:
    """Share a GPU's memory between the two libraries; keep both to the same CPU cores. Before JAX starts."""
    if device == "gpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _dtype(device: str) -> str:
    return "bfloat16" if device == "gpu" else "float32"


def _device_name(device: str) -> str:
    import jax

    return jax.devices()[0].device_kind if device == "gpu" else "one CPU core"


def clock(device: str) -> Callable[[], float]:
    """Seconds: of this process on a CPU, of the wall for a GPU."""
    return time.perf_counter if device == "gpu" else time.process_time


def matrix_rate(device: str) -> float:
    """FLOP/s of a square matrix product in the benchmark's dtype, of 8192 on a GPU and 1024 on a CPU."""
    import jax
    import jax.numpy as jnp

    n, now = (8192 if device == "gpu" else 1024), clock(device)
    a = jnp.ones((n, n), _dtype(device))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    best = math.inf
    for _ in range(10):
        start = now()
        for _ in range(4):
            out = product(a, a)
        jax.block_until_ready(out)
        best = min(best, (now() - start) / 4)
    return 2 * n**3 / best


def measure(case: Case, device: str, against: list[str], rounds: int) -> Row:
    """Time one network and its contenders."""
    size = case.gpu if device == "gpu" else case.cpu
    row, ours = build(case, size, device)
    contenders = {"ours": ours}
    if against and importlib.util.find_spec("diffusers") and importlib.util.find_spec("torch"):
        contenders |= rivals(case, size, device, against)
    for what, times in (("forward", row.forward), ("both", row.both)):
        times.update(
            race({name: calls[what] for name, calls in contenders.items()}, device, rounds, row.first_call, what)
        )
    del contenders, ours
    gc.collect()
    return row


def race(
    calls: Mapping[str, Callable[[int], None]], device: str, rounds: int, first: dict[str, float], what: str
) -> dict[str, float]:
    """Seconds of the fastest call of each, all taking turns; `first` gets the first call's, compilation included."""
    now, best, repeats = clock(device), dict.fromkeys(calls, math.inf), 4 if device == "gpu" else 1
    for name, call in calls.items():
        start = time.perf_counter()
        call(1)
        first[f"{name} {what}"] = time.perf_counter() - start
        call(1)
    for _ in range(rounds):
        for name, call in calls.items():
            start = now()
            call(repeats)
            best[name] = min(best[name], (now() - start) / repeats)
    return best


def build(case: Case, size: Size, device: str) -> tuple[Row, dict[str, Callable[[int], None]]]:
    """Our network: what is known of it, and its calls, repeated as often as they are told."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ddistill.net import split
    from ddistill.networks.conditions import Prompt

    module = importlib.import_module(f"ddistill.networks.{case.module}")
    config = getattr(module, f"{case.name}Config")(**size.options)
    dtype = jnp.dtype(_dtype(device))

    def make():
        return getattr(module, case.name)(config, dtype=dtype, rngs=nnx.Rngs(0))

    shapes, buffers, code = split(nnx.eval_shape(make))
    # Numbers of any kind do; compiling all of a UNet's initialisation as one program takes longer than measuring it.
    params, rest = (
        {path: 0.02 * jax.random.normal(jax.random.key(0), p.shape, dtype) for path, p in arrays.items()}
        for arrays in (shapes, buffers)
    )
    x = jax.random.normal(jax.random.key(1), (size.batch, size.side, size.side, case.channels))
    t = jnp.linspace(0.1, 0.9, size.batch)
    cond: Any = None
    if case.condition == "labels":
        cond = jnp.arange(size.batch)
    elif case.condition == "text":
        states, pooled = text_sizes(config)
        vector = jnp.ones((size.batch, pooled), dtype) if pooled else None
        cond = Prompt(jnp.ones((size.batch, size.tokens, states), dtype), pooled=vector)

    def forward(params, rest, x, cond):
        return code(params, rest)(x, t, cond)

    def loss(params, rest, x, cond):
        return jnp.mean(forward(params, rest, x, cond) ** 2)

    def call(compiled):
        def run(times):
            for _ in range(times):
                out = compiled(params, rest, x, cond)
            jax.block_until_ready(out)

        return run

    with jax.default_device(jax.devices("cpu")[0]):  # attention as products, not as a call of cuDNN
        operations = flops(jax.make_jaxpr(forward)(*jax.eval_shape(lambda *a: a, params, rest, x, cond)).jaxpr)
    count = sum(p.size for path, p in params.items() if not path.startswith(("target.", "guidance.")))
    row = Row(case.name, count, x.shape, size.tokens, operations)
    return row, {"forward": call(jax.jit(forward)), "both": call(jax.jit(jax.grad(loss)))}


def text_sizes(config: Any) -> tuple[int, int]:
    """The sizes of a text's states and, or 0, of its one vector that a network of this configuration takes."""
    names = ("joint_attention_dim", "caption_channels", "cross_attention_dim")
    states = next(getattr(config, n) for n in names if getattr(config, n, None))
    return states, getattr(config, "pooled_projection_dim", 0)


def flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr; those of a scan's body as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval.shape if equation.outvars else ()
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(out) * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            total += 2 * math.prod(out) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        else:
            inner = (getattr(p, "jaxpr", p) for p in equation.params.values())
            body = sum(flops(p) for p in inner if hasattr(p, "eqns"))
            total += body * equation.params.get("length", 1) if equation.primitive.name == "scan" else body
    return total


def rivals(case: Case, size: Size, device: str, against: list[str]) -> dict[str, dict[str, Callable[[int], None]]]:
    """diffusers' network, where it has one, eager and compiled: their calls, repeated as often as they are told."""
    import diffusers
    import torch

    if case.theirs is None:
        return {}
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    where = torch.device("cuda" if device == "gpu" else "cpu")
    kind = {"device": where, "dtype": getattr(torch, _dtype(device))}
    with torch.device(where):
        model = getattr(diffusers, case.theirs)(**size.options).to(**kind).eval()
    x = torch.randn(size.batch, case.channels, size.side, size.side, **kind)
    t = torch.linspace(0.1, 0.9, size.batch, **kind)
    kwargs: dict[str, Any] = {"timestep": t}
    if case.condition == "labels":
        kwargs["class_labels"] = torch.arange(size.batch, device=where)
    elif case.condition == "text":
        states, pooled = text_sizes(model.config)
        kwargs["encoder_hidden_states"] = torch.ones(size.batch, size.tokens, states, **kind)
        if pooled:
            kwargs["pooled_projections"] = torch.ones(size.batch, pooled, **kind)
    if case.name == "PixArt":
        kwargs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    if case.name == "Flux":  # packed as its pipeline packs: tokens of 2 × 2 pixels, their row and column as ids
        half = size.side // 2
        x = torch.randn(size.batch, half * half, 4 * case.channels, **kind)
        grid = torch.meshgrid(*(torch.arange(n) for n in (1, half, half)), indexing="ij")
        kwargs["img_ids"] = torch.stack([axis.flatten() for axis in grid], dim=-1).to(**kind)
        kwargs["txt_ids"] = torch.zeros(size.tokens, 3, **kind)

    def wait():
        if device == "gpu":
            torch.cuda.synchronize()

    def calls(network):
        def forward(times):
            with torch.no_grad():
                for _ in range(times):
                    network(x, **kwargs)
            wait()

        def both(times):
            for _ in range(times):
                model.zero_grad(set_to_none=True)
                network(x, **kwargs).sample.float().square().mean().backward()
            wait()

        return {"forward": forward, "both": both}

    networks = {"eager": lambda: model, "compiled": lambda: torch.compile(model)}
    return {name: calls(networks[name]()) for name in against}


HEAD = (
    f"{'network':<16}{'params':>9}{'input':>20}{'GFLOP':>9} |{'forward':>10}{'eager':>7}{'compiled':>9}{'rate':>6}"
    f" |{'+backward':>10}{'eager':>7}{'compiled':>9}{'rate':>6}"
)


def line(row: Row, rate: float) -> str:
    """A line of the table: milliseconds of ours, ratios to the contenders, share of the matrix rate."""

    def part(times, operations):
        ratios = [f"{times['ours'] / times[c]:.2f}" if c in times else "–" for c in ("eager", "compiled")]
        share = operations / times["ours"] / rate
        return f" |{1e3 * times['ours']:>7.4g} ms{ratios[0]:>7}{ratios[1]:>9}{share:>6.0%}"

    shape = "×".join(map(str, row.input)) + (f"+{row.tokens}" if row.tokens else "")
    head = f"{row.network:<16}{row.parameters / 1e6:>7.4g} M{shape:>20}{row.flops / 1e9:>9.4g}"
    return head + part(row.forward, row.flops) + part(row.both, 3 * row.flops)


if __name__ == "__main__":
    main()
