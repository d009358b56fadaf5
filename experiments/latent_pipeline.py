"""From photographs to few-step students that diffusers samples: a latent pipeline in minutes on a CPU, without network.

    python experiments/latent_pipeline.py --work runs/latent_pipeline
    python experiments/latent_pipeline.py --work runs/small --small

A latent diffusion model of one's own, every step of it with the commands that serve published ones:

1. Patches of the photographs that scikit-learn and, where it is installed, scikit-image bring become a folder of
   images, in which the photograph is the class. A small autoencoder (AutoencoderKL) is trained on them.
2. `ddistill encode` takes the patches to latents. A small DiT is trained on these, and saved with the autoencoder as
   the folder of a diffusers pipeline.
3. `ddistill import` makes it a teacher; `ddistill distill` trains two students of it: latent_lora.py, consistency with
   low-rank adapters, and latent_dmd.py, distribution matching to one step.
4. `ddistill export` writes each as a diffusers folder. Where torch is installed diffusers samples it from ddistill's
   noise, and the pictures must agree.

Writes all that to --work, with table.md and samples.png. --small shows in seconds that the parts fit together, and
learns nothing.
"""

import argparse
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from ddistill.cli import main as ddistill
from ddistill.config import Optimizer
from ddistill.datasets import LatentFolder
from ddistill.evaluate.metrics import frechet
from ddistill.evaluate.samplers import start, student_sampler, teacher_sampler
from ddistill.hub.autoencoders import Autoencoder, load_autoencoder
from ddistill.hub.configs import diffusion_of
from ddistill.hub.save import Recipe, recipe, save_autoencoder, save_pipeline
from ddistill.integrators import ddim, dpmpp_2m
from ddistill.losses.times import Uniform
from ddistill.losses.weightings import VWeight
from ddistill.methods import Denoising
from ddistill.methods.base import sampling_of
from ddistill.net import Net, from_nnx, split
from ddistill.networks.autoencoder import DOWN, UP, AutoencoderKL, AutoencoderKLConfig
from ddistill.networks.dit import DiT, DiTConfig
from ddistill.report import save_sample_sheet
from ddistill.runs import Opened, open_run
from ddistill.sample import sample
from ddistill.stages import Stage, run

HERE = Path(__file__).parent
SIDE = 32
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
STUDENTS = {"lora": (1, 4), "dmd": (1,)}
"""Students and the numbers of steps that they are sampled with; they are exported for the largest."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large all is: patches of each photograph, batches, and networks and trainings."""

    patches: int = 400
    held_out: int = 100
    batch: int = 64
    autoencoder_widths: tuple[int, ...] = (16, 32, 48)
    autoencoder_steps: int = 400
    width: int = 96
    layers: int = 3
    teacher_steps: int = 1200
    student_flags: tuple[str, ...] = ()


SMALL = Scale(
    patches=16, held_out=16, batch=8, autoencoder_widths=(4, 4, 4), autoencoder_steps=20, width=16, layers=1,
    teacher_steps=40, student_flags=("--steps", "4", "--batch-size", "8"),
)  # fmt: skip


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """Name and picture of each photograph that is on this machine."""
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    for file, pixels in zip(samples.filenames, samples.images, strict=True):
        yield Path(file).stem, Image.fromarray(pixels)
    # skimage.data would download what the package does not bring: the files that are there are read by themselves.
    if (found := importlib.util.find_spec("skimage")) and found.origin:
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
            if (file := Path(found.origin).parent / "data" / name).is_file():
                yield file.stem, Image.open(file).convert("RGB")


def cut(picture: Image.Image, count: int, rng: np.random.Generator) -> np.ndarray:
    """Patches [count, SIDE, SIDE, 3] of bytes at random places of a photograph, at a third of its resolution."""
    pixels = np.asarray(picture.reduce(3))
    rows, columns = (rng.integers(0, size - SIDE + 1, count) for size in pixels.shape[:2])
    return np.stack([pixels[r : r + SIDE, c : c + SIDE] for r, c in zip(rows, columns, strict=True)])


def write_patches(folder: Path, scale: Scale, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Write training patches as images, a folder for each photograph; answers them and held-out ones, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    train, held_out = [], []
    for name, picture in photographs():
        train.append(cut(picture, scale.patches, rng))
        held_out.append(cut(picture, scale.held_out, rng))
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, patch in enumerate(train[-1]):
            Image.fromarray(patch).save(folder / name / f"{i:04}.png")
    return tuple(np.concatenate(x).astype(np.float32) / 127.5 - 1 for x in (train, held_out))


def initialised(make: Callable[[], nnx.Module]) -> tuple[dict, dict]:
    """Parameters and buffers of a new module, in one compilation instead of one for each of their shapes."""
    return jax.jit(lambda: split(make())[:2])()


def train_autoencoder(folder: Path, pictures: np.ndarray, scale: Scale, seed: int) -> Autoencoder:
    """Train an autoencoder (L1 and a little KL, Rombach et al. 2022), scale its latents to unit variance, save it."""
    levels = len(scale.autoencoder_widths)
    config = AutoencoderKLConfig(
        down_block_types=(DOWN,) * levels, up_block_types=(UP,) * levels, block_out_channels=scale.autoencoder_widths,
        norm_num_groups=4, mid_block_add_attention=False, sample_size=SIDE,
    )  # fmt: skip

    def make() -> AutoencoderKL:
        return AutoencoderKL(config, rngs=nnx.Rngs(seed))

    (params, rest), code = initialised(make), split(nnx.eval_shape(make))[2]
    optimizer = Optimizer(learning_rate=3e-3, clip=1.0).build(scale.autoencoder_steps)

    def loss(params, x, key):
        module = code(params, rest)
        posterior = module.encode(x)
        missed = jnp.mean(jnp.abs(module.decode(posterior.sample(key)) - x))
        return missed + 1e-4 * jnp.mean(posterior.kl()) / posterior.mean[0].size

    @jax.jit
    def step(params, moments, x, key):
        updates, moments = optimizer.update(jax.grad(loss)(params, x, key), moments, params)
        return jax.tree.map(jnp.add, params, updates), moments

    moments, rng = optimizer.init(params), np.random.default_rng(seed)
    for key in jax.random.split(jax.random.key(seed), scale.autoencoder_steps):
        x = pictures[rng.integers(0, len(pictures), min(32, scale.batch))]
        params, moments = step(params, moments, x, key)
    posterior = jax.jit(lambda params, x: code(params, rest).encode(x))(params, pictures[:: len(pictures) // 32])
    spread = float(jnp.std(posterior.sample(jax.random.key(seed))))
    save_autoencoder(folder, dataclasses.replace(config, scaling_factor=1 / spread), params)
    return load_autoencoder(folder)


def train_teacher(latents: Path, scale: Scale, seed: int) -> Net:
    """Train a DiT that denoises latents of a class and, one time in ten, of none."""
    data = LatentFolder(latents).load()
    side, _, channels = data.shape
    process, precondition = diffusion_of(SCHEDULER)
    config = DiTConfig(
        num_attention_heads=4, attention_head_dim=scale.width // 4, in_channels=channels, out_channels=channels,
        num_layers=scale.layers, sample_size=side, patch_size=2, num_embeds_ada_norm=data.num_classes,
    )  # fmt: skip

    def make() -> DiT:
        return DiT(config, rngs=nnx.Rngs(seed))

    params, rest = initialised(make)
    network = from_nnx(nnx.eval_shape(make), process, precondition).replace(params=params, rest=rest)
    stage = Stage(
        "teacher", Denoising(times=Uniform(), weighting=VWeight())(process), scale.teacher_steps,
        source=lambda _: data.source(scale.batch, seed, unlabelled=0.1), optimizer=Optimizer(2e-3, clip=1.0).build,
    )  # fmt: skip
    return run([stage], network, jax.random.key(seed))[0]


def command(*words: object) -> None:
    """Run a command of ddistill, here; an error, which it has told, ends all."""
    if status := ddistill([str(word) for word in words]):
        raise SystemExit(status)


def by_diffusers(folder: Path, made: Recipe, noise: np.ndarray, labels: np.ndarray, key: jax.Array) -> np.ndarray:
    """Pictures [n, H, W, 3] in [0, 1] that diffusers samples from an exported folder, noise [n, h, w, C] ddistill's."""
    import torch
    from diffusers import DiTPipeline

    def theirs(x) -> torch.Tensor:
        return torch.from_numpy(np.transpose(np.asarray(x), (0, 3, 1, 2)).copy())

    pipe = DiTPipeline.from_pretrained(folder)
    between = [theirs(jax.random.normal(jax.random.fold_in(key, i), noise.shape)) for i in range(len(made.times) - 2)]
    pipe.scheduler.set_timesteps(**made.call)
    x, label = theirs(noise), torch.from_numpy(np.asarray(labels, np.int64))
    with torch.no_grad(), mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", side_effect=between):
        for t in pipe.scheduler.timesteps:
            out = pipe.transformer(x, timestep=t.expand(len(x)), class_labels=label).sample
            x = pipe.scheduler.step(out, t, x, **made.step).prev_sample
        pictures = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return np.transpose(pictures.numpy(), (0, 2, 3, 1)).clip(-1, 1) / 2 + 0.5


def disagreement(opened: Opened, folder: Path, autoencoder: Autoencoder, steps: int, begin: tuple) -> float | None:
    """The largest difference of pictures in [0, 1], of diffusers from the exported folder and ddistill from the run.

    begin: noise, labels and the key of noise to come. None where torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    process = opened.experiment.process
    sampling = sampling_of(opened.experiment.method(process))
    made = recipe(opened.student, process, sampling.times(steps), sampling.gamma, SCHEDULER)
    noise, labels, key = begin
    draw = jax.jit(sample, static_argnums=1, static_argnames="gamma")
    latents = draw(opened.student, made.process, np.asarray(made.times), noise, key, gamma=made.gamma, cond=labels).x
    ours = in_parts(autoencoder.pictures, latents) / 2 + 0.5
    return float(np.abs(by_diffusers(folder, made, np.asarray(noise), np.asarray(labels), key) - ours).max())


def in_parts(function: Callable, x: np.ndarray, size: int = 100) -> np.ndarray:
    """function(x), computed for so many at a time."""
    return np.concatenate([np.asarray(function(x[i : i + size])) for i in range(0, len(x), size)])


class Judge:
    """Rows of the table and of the sheet: how far sets of latents and their pictures are from the training patches."""

    def __init__(self, autoencoder: Autoencoder, train: np.ndarray, columns: int = 16):
        self.autoencoder, self.columns = autoencoder, columns
        self.train, self.rows, self.sheet = self._sides(train), [], []

    def add(
        self, name: str, calls: int | None, seconds: float | None, pictures: np.ndarray | None, latents=None
    ) -> None:
        """Judge a set, pictures in [-1, 1] or latents to be decoded; seconds: of CPU that its training took."""
        if pictures is None:
            pictures = in_parts(self.autoencoder.pictures, latents)
        values = [frechet(a, b) / b.var() for a, b in zip(self._sides(pictures), self.train, strict=True)]
        self.rows.append((name, calls, *values, seconds))
        self.sheet.append((name if calls is None else f"{name}, {calls}", pictures[: self.columns] / 2 + 0.5))

    def _sides(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pictures averaged to 8 x 8 pixels, and means of their latents."""
        coarse = pictures.reshape(len(pictures), 8, SIDE // 8, 8, SIDE // 8, 3).mean((2, 4))
        return coarse, in_parts(lambda x: self.autoencoder.moments(x)["mean"], pictures)


def cpu_seconds(do, *args) -> tuple[float, object]:
    """The CPU time that a call takes, and its answer."""
    begin = time.process_time()
    answer = do(*args)
    return time.process_time() - begin, answer


def page(rows: list[tuple], agreed: dict[str, float | None]) -> str:
    """The table in Markdown, and what diffusers made of the exports."""

    def cell(value, form: str = "") -> str:
        return "–" if value is None else format(value, form)

    lines = ["| pictures | network calls | Fréchet, 8 × 8 pixels | Fréchet, latents | CPU-seconds to train |"]
    lines += ["|---|---|---|---|---|"]
    for name, calls, pixels, latents, seconds in rows:
        lines += [f"| {name} | {cell(calls)} | {pixels:.3g} | {latents:.3g} | {cell(seconds, '.0f')} |"]
    for name, difference in agreed.items():
        told = "not asked, torch is not installed" if difference is None else f"{difference:.1e} in [0, 1]"
        lines += ["", f"diffusers on the export of {name}, from the same noise: largest difference of pixels {told}."]
    return "\n".join(lines) + "\n"


def pipeline(work: Path, scale: Scale, seed: int = 0, most: float = 1e-4) -> dict[str, float | None]:
    """All of it, in a folder; answers for each student how far pictures of diffusers are from ddistill's.

    Raises ValueError where that is more than `most`.
    """
    train, held_out = write_patches(work / "patches", scale, seed)
    seconds = {}
    seconds["autoencoder"], autoencoder = cpu_seconds(train_autoencoder, work / "vae", train, scale, seed)
    command("encode", work / "patches", "--to", work / "latents", "--models", work / "vae", "--size", SIDE)
    seconds["teacher"], teacher = cpu_seconds(train_teacher, work / "latents", scale, seed)
    save_pipeline(work / "pipeline", teacher, SCHEDULER, autoencoder=autoencoder)
    command("import", work / "pipeline", "--to", work / "teacher")

    judge, count = Judge(autoencoder, train), len(held_out)
    shuffled = np.random.default_rng(seed).permutation(held_out)
    judge.add("other patches of the photographs (floor)", None, None, shuffled)
    encoded = in_parts(lambda x: autoencoder.moments(x)["mean"], shuffled)
    judge.add("the same, through the autoencoder", None, seconds["autoencoder"], None, encoded)
    agreed = {}
    for name, steps in STUDENTS.items():
        where = ("--workdir", work / name, "--network.folder", work / "teacher", "--data.folder", work / "latents")
        flags = (*where, *scale.student_flags)
        seconds[name], _ = cpu_seconds(command, "distill", HERE / f"latent_{name}.py", *flags)
        command("export", work / name, "--to", work / f"{name}-diffusers", "--steps", steps[-1])
        opened = open_run(work / name)
        process, method = opened.experiment.process, opened.experiment.method
        begin = start(process, opened.data.shape, opened.data.num_classes, count, seed)
        if name == next(iter(STUDENTS)):
            for integrator, n in ((dpmpp_2m, 20), (ddim, 1)):
                sampler = teacher_sampler(opened.teacher, process, integrator, n, "teacher")
                judge.add("teacher", n, seconds["teacher"], None, np.asarray(sampler.draw(*begin).x))
        for n in steps:
            sampler = student_sampler(opened.student, method(process), process, n)
            judge.add(name, n, seconds[name], None, np.asarray(sampler.draw(*begin).x))
        agreed[name] = disagreement(opened, work / f"{name}-diffusers", autoencoder, steps[-1], begin)
    text = page(judge.rows, agreed)
    (work / "table.md").write_text(text, encoding="utf-8")
    save_sample_sheet(work / "samples.png", judge.sheet, scale=2)
    print(text)
    far = {name: difference for name, difference in agreed.items() if difference is not None and difference > most}
    if far:
        raise ValueError(f"diffusers samples other pictures than ddistill, by more than {most}: {far}")
    return agreed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument("--small", action="store_true", help="a few steps of tiny networks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipeline(args.work, SMALL if args.small else Scale(), args.seed)


if __name__ == "__main__":
    main()
