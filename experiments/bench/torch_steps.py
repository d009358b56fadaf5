"""Distillation steps in PyTorch, as one writes them there: what `step.py` compares ours with.

Networks are called as network(x, c_noise, labels) on [B, C, H, W]; EDM's DDPM++ is written out here, of the layers and
sizes of NVlabs/edm's, and DiT is diffusers'. The steps are those of `Consistency(solver=euler)` and
`DMD(Auxiliary(stable=False), times=KarrasRamp())`, with AdamW, clipped gradients and an average of the student.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T_MIN, T_MAX, SIGMA_DATA = 0.002, 80.0, 0.5


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, min(32, channels // 4)), channels, eps=1e-6)


class Block(nn.Module):
    """Residual block with self-attention of one head, told the noise by an embedding."""

    def __init__(self, inward: int, outward: int, width: int, *, move: str = "", attend: bool = False):
        super().__init__()
        self.move = move
        self.norm0, self.conv0 = norm(inward), nn.Conv2d(inward, outward, 3, padding=1)
        self.affine = nn.Linear(width, outward)
        self.norm1, self.conv1 = norm(outward), nn.Conv2d(outward, outward, 3, padding=1)
        self.skip = nn.Conv2d(inward, outward, 1) if inward != outward or move else None
        self.attend = attend
        if attend:
            self.norm2 = norm(outward)
            self.qkv, self.proj = nn.Conv2d(outward, 3 * outward, 1), nn.Conv2d(outward, outward, 1)

    def moved(self, x: Tensor) -> Tensor:
        """Half or double the size, or x itself."""
        if self.move == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.move == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, C, H, W] and [B, E] -> [B, C', H', W']."""
        y = self.conv0(self.moved(F.silu(self.norm0(x))))
        y = F.silu(self.norm1(y + self.affine(emb)[:, :, None, None]))
        y = self.conv1(y)
        x = self.moved(x)
        x = (y + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.attend:
            q, k, v = self.qkv(self.norm2(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
            a = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
            x = (x + self.proj(a)) * math.sqrt(0.5)
        return x


class SongUNet(nn.Module):
    """EDM's DDPM++: the levels, blocks and attention of `ddistill.networks.edm.SongUNet`."""

    def __init__(self, img_resolution: int, model_channels: int = 128, num_blocks: int = 4, dropout: float = 0.0):
        super().__init__()
        c, width, sizes = model_channels, 4 * model_channels, [model_channels * m for m in (1, 2, 2, 2)]
        self.waves = c // 2
        self.map0, self.map1 = nn.Linear(c, width), nn.Linear(width, width)
        self.first = nn.Conv2d(3, c, 3, padding=1)
        enc, dec, skips = [], [], [c]
        for level, size in enumerate(sizes):
            attend = img_resolution >> level == 16
            if level:
                enc.append(Block(c, c, width, move="down"))
                skips.append(c)
            for _ in range(num_blocks):
                enc.append(Block(c, size, width, attend=attend))
                c = size
                skips.append(c)
        for level, size in reversed(list(enumerate(sizes))):
            if level == len(sizes) - 1:
                dec += [Block(c, c, width, attend=True), Block(c, c, width)]
            else:
                dec.append(Block(c, c, width, move="up"))
            for i in range(num_blocks + 1):
                attend = img_resolution >> level == 16 and i == num_blocks
                dec.append(Block(c + skips.pop(), size, width, attend=attend))
                c = size
        self.enc, self.dec = nn.ModuleList(enc), nn.ModuleList(dec)
        self.inward = [block.conv0.in_channels for block in dec]
        self.norm, self.last = norm(c), nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """Like x."""
        frequencies = 10_000.0 ** -(torch.arange(self.waves, device=x.device) / (self.waves - 1))
        angles = c_noise[:, None] * frequencies
        emb = F.silu(self.map1(F.silu(self.map0(torch.cat([angles.sin(), angles.cos()], dim=1)))))
        x = self.first(x)
        skips = [x]
        for block in self.enc:
            x = block(x, emb)
            skips.append(x)
        for block, inward in zip(self.dec, self.inward, strict=True):
            if inward != x.shape[1]:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return self.last(F.silu(self.norm(x)))


class DiT(nn.Module):
    """diffusers' DiT, called as the other networks are."""

    def __init__(self, **options):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        inner: Any = DiTTransformer2DModel(**options)
        self.inner = inner.eval()  # no dropout of labels

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        """Like x."""
        return self.inner(x, timestep=c_noise, class_labels=labels).sample[:, : x.shape[1]]


class Steps:
    """A consistency step, a DMD step and samplers around copies of one network.

    half: the networks run under autocast to bfloat16. compiled: by torch.compile.
    """

    def __init__(self, network: nn.Module, *, half: bool, compiled: bool):
        self.teacher = network.requires_grad_(False)
        self.half = half
        self.student, self.fake = (copy.deepcopy(network).requires_grad_(True) for _ in range(2))
        self.ema = copy.deepcopy(network)
        self.wrapped = {m: torch.compile(m) if compiled else m for m in (self.teacher, self.student, self.fake)}
        fused: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01, "fused": True}
        self.adam = {m: torch.optim.AdamW(m.parameters(), **fused) for m in (self.student, self.fake)}

    def denoise(self, network: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """EDM's preconditioning (Karras et al. 2022, table 1)."""
        s = t.view(-1, 1, 1, 1)
        total = s**2 + SIGMA_DATA**2
        with torch.autocast(x.device.type, torch.bfloat16) if self.half else nullcontext():
            out = self.wrapped[network](x * total.rsqrt(), t.clamp(min=1e-4).log() / 4, labels)
        return x * SIGMA_DATA**2 / total + out.float() * s * SIGMA_DATA * total.rsqrt()

    def update(self, network: nn.Module, loss: Tensor) -> None:
        """One step of AdamW."""
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        self.adam[network].step()
        self.adam[network].zero_grad(set_to_none=True)

    @torch.no_grad()
    def average(self) -> None:
        """Let the average follow the student."""
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.student.parameters()), 0.01)

    def consistency(self, x0: Tensor, labels: Tensor | None, n: int = 18) -> None:
        """Song et al. 2023, eq. 7, with Euler's method and the student behind a stop-gradient as the target."""
        i = (torch.rand(len(x0), device=x0.device) * n).clamp(max=n - 1)
        t, s = ramp(i / (n - 1)), torch.where(i + 1 >= n, torch.zeros_like(i), ramp((i + 1) / (n - 1)))
        x_t = x0 + t.view(-1, 1, 1, 1) * torch.randn_like(x0)
        with torch.no_grad():
            slope = (x_t - self.denoise(self.teacher, x_t, t, labels)) / t.view(-1, 1, 1, 1)
            x_s = x_t + (s - t).view(-1, 1, 1, 1) * slope
            target = self.denoise(self.student, x_s, s, labels)
        squares = (self.denoise(self.student, x_t, t, labels) - target).flatten(1).square().sum(1)
        c = 0.00054 * math.sqrt(x0[0].numel())
        self.update(self.student, (((squares + c**2).sqrt() - c) / (t - s)).mean())
        self.average()

    def dmd(self, x0: Tensor, labels: Tensor | None) -> None:
        """Yin et al. 2024: the generator by the difference of two denoisers, the fake one on its samples."""
        t_max = torch.full((len(x0),), T_MAX, device=x0.device)
        x = self.denoise(self.student, T_MAX * torch.randn_like(x0), t_max, labels)
        t = ramp(0.02 + 0.96 * torch.rand(len(x0), device=x0.device))
        with torch.no_grad():
            x_t = x + t.view(-1, 1, 1, 1) * torch.randn_like(x)
            real, fake = (self.denoise(m, x_t, t, labels) for m in (self.teacher, self.fake))
            weight = (x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.01).reciprocal()
            gradient = torch.nan_to_num(weight * (fake - real), 0.0, 0.0, 0.0)
        self.update(self.student, 0.5 * F.mse_loss(x, (x - gradient).detach()))
        x, t = x.detach(), ramp(torch.rand(len(x0), device=x0.device))
        x_t = x + t.view(-1, 1, 1, 1) * torch.randn_like(x)
        weight = t**-2 + SIGMA_DATA**-2
        error = (self.denoise(self.fake, x_t, t, labels) - x).square().mean((1, 2, 3))
        self.update(self.fake, (weight * error).mean())
        self.average()

    @torch.no_grad()
    def sample(self, like: Tensor, labels: Tensor | None, times: list[float]) -> Tensor:
        """Jump to the data and add noise again (Song et al. 2023, alg. 1)."""
        x = times[0] * torch.randn_like(like)
        for t, following in pairwise(times):
            x = self.denoise(self.student, x, torch.full((len(x),), t, device=x.device), labels)
            x = x + following * torch.randn_like(x) if following else x
        return x


def ramp(share: Tensor) -> Tensor:
    """Karras' times at shares of the way from T_MAX to T_MIN."""
    return (T_MAX ** (1 / 7) + share * (T_MIN ** (1 / 7) - T_MAX ** (1 / 7))) ** 7


def calls(steps: Steps, x: Tensor, labels: Tensor | None, times: dict[str, list[float]]) -> dict[str, Callable]:
    """What is timed, by name; each is told how often to repeat itself."""

    def repeated(call: Callable[[], object]) -> Callable[[int], None]:
        def run(count: int) -> None:
            for _ in range(count):
                call()
            if x.device.type == "cuda":
                torch.cuda.synchronize()

        return run

    made: dict[str, Callable[[], object]] = {
        "consistency": lambda: steps.consistency(x, labels),
        "dmd": lambda: steps.dmd(x, labels),
        **{name: partial(steps.sample, x, labels, grid) for name, grid in times.items()},
    }
    return {name: repeated(call) for name, call in made.items()}
