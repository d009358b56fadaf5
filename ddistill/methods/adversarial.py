"""Adversarial terms: a discriminator between the student's samples and the data, for every method."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.losses.adversarial import GANLoss, Logistic
from ddistill.losses.times import LogNormal, TimeLaw
from ddistill.methods.base import Init, Metrics
from ddistill.methods.discriminators import Discriminator, Plain
from ddistill.net import Net, frozen
from ddistill.process import Process

Nets = Mapping[str, Net]


@dataclass(frozen=True)
class Adversary:
    """A discriminator D_η(x, t, cond) with its loss, the network "discriminator" of a method.

    noise: real and fake samples are compared at x_t = α_t x + σ_t ε with times of this law, the same t and ε for both
    (Diffusion-GAN, Wang et al. 2022; LADD): at high noise the two overlap, and missing modes are missed. None compares
    the samples themselves, at t_min. r1: γ in ½ γ E‖∇ D‖² at real samples, the gradient by what the heads see: features
    (ADD, sec. 3.2), or the sample scaled to unit variance; D is the mean of a sample's logits (Mescheder et al. 2018).
    None is .01 for each coordinate of a sample, as γ grows with the pixels in StyleGAN2-ADA (Karras et al. 2020): the
    more coordinates, the more easily samples are told apart. r2: the same at fake ones. rate: the discriminator's
    learning rate as a multiple of the optimiser's.
    """

    network: Discriminator = field(default_factory=Plain)
    loss: GANLoss = field(default_factory=Logistic)
    noise: TimeLaw | None = field(default_factory=lambda: LogNormal(-1.2, 1.6))
    r1: float | None = None
    r2: float | None = None
    rate: float = 1.0

    def start(self, process: Process) -> Init:
        """How the discriminator of a process starts."""
        return lambda teacher, key, space: self.network(process, teacher, key, space)

    def generator(
        self, process: Process, nets: Nets, fake: Array, cond: Any, key: Array, origin: Array | None = None
    ) -> Array:
        """What the discriminator has against samples fake [B, ...]; differentiated by them alone.

        origin: times [B] that the samples were drawn from: those of each time are matched with the data, and not only
        all together.
        """
        x_t, t = self._noised(process, fake, key)
        return self.loss.generator(frozen(nets["discriminator"])(x_t, t, cond, s=origin))

    def discriminator(
        self, process: Process, nets: Nets, real: Array, fake: Array, cond: Any, key: Array, origin: Array | None = None
    ) -> tuple[Array, Metrics]:
        """The discriminator's loss on data and samples of the same conditions [B, ...]; fake is not differentiated."""
        judge = nets["discriminator"]
        real_t, t = self._noised(process, real, key)
        fake_t, _ = self._noised(process, jax.lax.stop_gradient(fake), key)
        r1, r2 = (0.01 * real[0].size if r is None else r for r in (self.r1, self.r2))
        of_real, slope_real = _logits(judge, real_t, t, cond, origin, slope=r1 > 0)
        of_fake, slope_fake = _logits(judge, fake_t, t, cond, origin, slope=r2 > 0)
        gan = self.loss.real(of_real) + self.loss.fake(of_fake)
        metrics = {"gan": gan, "real": jnp.mean(of_real), "fake": jnp.mean(of_fake), "slope": slope_real}
        return gan + 0.5 * (r1 * slope_real + r2 * slope_fake), metrics

    def _noised(self, process: Process, x: Array, key: Array) -> tuple[Array, Array]:
        if self.noise is None:
            return x, jnp.full(x.shape[0], process.t_min)
        k_t, k_noise = jax.random.split(key)
        t = self.noise(process, k_t, x.shape[0])
        return process.diffuse(x, jax.random.normal(k_noise, x.shape), t), t


def _logits(judge: Net, x: Array, t: Array, cond: Any, s: Array | None, slope: bool) -> tuple[Array, Array]:
    """D(x, t, cond, s) [B, n], and E‖∇ mean D‖² by what the heads see, if it is wanted."""
    code: Any = judge.apply
    seen = code.see(judge.rest, x, t, cond)

    def of(seen):
        return code.judge(judge.params, judge.rest, seen, t, cond, s)

    if not slope:
        return of(seen), jnp.zeros(())
    gradient = jax.grad(lambda seen: jnp.sum(jnp.mean(of(seen), axis=1)))(seen)
    squares = [jnp.sum(g**2) for g in jax.tree.leaves(gradient)]
    return of(seen), jnp.sum(jnp.stack(squares)) / x.shape[0]


def balance(main: Callable[[Net], Array], other: Callable[[Net], Array], net: Net, layer: str) -> Array:
    """‖∇ L_main‖/(‖∇ L_other‖ + 1e-4) by the parameters of path `layer`, behind a stop-gradient.

    The weight with which another loss pulls as hard as the main one (Esser et al. 2021, eq. 7; CTM, eq. 12).
    Raises ValueError if the network has no such parameters.
    """
    if layer not in net.params:
        raise ValueError(
            f"no parameters {layer!r} in the student: name those of its last layer, CTM(last_layer=…), of "
            f"{', '.join(sorted(net.params))}"
        )

    def norm(loss):
        def of(kernel):
            return loss(net.replace(params={**net.params, layer: kernel}))

        return jnp.linalg.norm(jax.grad(of)(net.params[layer]))

    return jax.lax.stop_gradient(norm(main) / (norm(other) + 1e-4))
