"""Distribution matching: a generator whose samples have the teacher's scores at every noise level (Yin et al. 2024)."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.losses.score import DirectionWeight, Normalised, directed, divergence_gradient
from ddistill.losses.times import Descending, TimeLaw, law_at
from ddistill.methods.base import Method, Sampling, from_teacher
from ddistill.methods.consistency import renoising_times
from ddistill.methods.fake_scores import Auxiliary, Drawn, Fake, MultiSample
from ddistill.methods.kd import KD
from ddistill.methods.sharing import once
from ddistill.methods.together import Together
from ddistill.net import Net, frozen
from ddistill.process import Process, expand


@dataclass(frozen=True)
class DMD:
    """E_t KL(p_fake,t ‖ p_real,t) between the student's samples x = G_θ(z) and the teacher's, by its gradient

        w_t α_t (s_fake − s_real)(x_t, t) ∂x/∂θ,        x_t = α_t x + σ_t ε                    (Yin et al. 2024, eq. 7)

    in which no score is differentiated: the surrogate is ½‖x − sg(x − gradient)‖². Data-free: a batch tells the shape
    and the conditions of the samples.

    fake: where s_fake comes from. times: the law of t, `KarrasRamp` in the papers; here high noise, which weighs the
    modes, begins, and low noise, which shapes them, joins in. weight: w_t (α_t/σ_t)², of μ_fake − μ_real; the
    paper's normaliser by default. Guidance is the teacher's alone. every: the student is updated in one step of so
    many; the fake score in each. rate, fake_rate: their learning rates as multiples of the optimiser's, the student's
    the smaller, so that the score of its samples can follow it. steps: with more than one the student learns to jump
    from its own samples, renoised to `renoising_times` as when it is sampled (backward simulation; Yin et al. 2024b,
    sec. 4.4). inner: the times it is renoised to, if they are others.
    """

    fake: Fake = field(default_factory=Auxiliary)
    times: TimeLaw | Descending = field(default_factory=Descending)
    weight: DirectionWeight = field(default_factory=Normalised)
    every: int = 1
    rate: float = 0.3
    fake_rate: float = 1.0
    steps: int = 1
    ema: float = 0.99
    inner: tuple[float, ...] = ()

    def __call__(self, process: Process) -> Method:
        """The method on a process."""

        def draw(nets, batch, key) -> Drawn:
            k_start, k_net, k_fake, _ = jax.random.split(key, 4)
            cond = batch.get("cond")

            def generate():
                x_t, t = self.start(process, frozen(nets["student"]), batch["x"].shape, cond, k_start)
                return nets["student"].jump(process, x_t, t, jnp.zeros_like(t), cond, key=k_net)

            return Drawn(once(nets, "student", key, generate), cond, nets, batch, k_fake)

        def loss(nets, batch, progress, key):
            drawn = draw(nets, batch, key)
            k_t, k_noise = jax.random.split(jax.random.split(key, 4)[3])
            x = jax.lax.stop_gradient(drawn.x)
            t = law_at(self.times, progress.share)(process, k_t, x.shape[0])
            x_t = process.diffuse(x, jax.random.normal(k_noise, x.shape), t)
            real, fake = nets["teacher"](x_t, t, drawn.cond), self.fake(process, x_t, t, drawn)
            gradient = divergence_gradient(process, t, x, fake, real, self.weight)
            return directed(drawn.x, gradient), {"gradient": jnp.sqrt(jnp.mean(gradient**2))}

        others = self.fake.networks(process, draw)
        rates = {"student": self.rate, **dict.fromkeys(others, self.fake_rate)}
        return Method(
            losses={"student": loss, **{name: other for name, (_, other) in others.items()}},
            init={"student": from_teacher, **{name: init for name, (init, _) in others.items()}},
            every={"student": self.every},
            rate=rates,
            memory=self.fake.memory(draw),
            ema={"ema": ("student", self.ema)},
            needs=frozenset({"x"}),
            result="ema",
            sampling=Sampling(lambda steps: self.sampling_times(process, steps), gamma=1.0),
        )

    def start(self, process: Process, student: Net, shape: tuple[int, ...], cond, key: Array) -> tuple[Array, Array]:
        """What the student jumps from and when, x_t [B, ...] and t [B]: noise, or its own samples renoised."""
        k_stop, *keys = jax.random.split(key, self.steps + 1)
        times = renoising_times(process, self.steps, self.inner)
        stop = jax.random.randint(k_stop, shape[:1], 0, self.steps)
        x = process.prior(keys[0], shape)
        for i in range(1, self.steps):
            x0 = student.jump(process, x, times[i - 1], 0.0, cond)
            renoised = process.diffuse(x0, jax.random.normal(keys[i], shape), times[i])
            x = jnp.where(expand(stop >= i, x), renoised, x)
        return x, times[stop]

    def sampling_times(self, process: Process, steps: int) -> Array:
        """Times of the sampler, which are those that the student has learned to jump from."""
        if steps not in (1, self.steps):
            raise ValueError(
                f"this student of distribution matching was taught {self.steps} steps; given {steps} steps"
            )
        return renoising_times(process, steps, self.inner if steps == self.steps else ())


def dmd_with_regression(weight: float = 0.25) -> Together:
    """L_DMD + λ E d(G_θ(x_T), Φ_{T→0}(x_T)) over teacher pairs: DMD as first published (Yin et al. 2024, eq. 9).

    The regression holds every mode of the teacher, which the divergence, reverse as it is, may drop.
    """
    return Together(DMD(), KD(steps=(1,)), weight)


def dmd_multi_sample(weight: float = 0.25) -> Together:
    """`dmd_with_regression` without a network for the fake score: that of the step's own samples takes its place."""
    return Together(DMD(MultiSample()), KD(steps=(1,)), weight)
