"""`ddistill serve`: a local page on which a student is sampled beside its teacher."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddistill.cli import Serve
from ddistill.cli.networks import prompt_encoder
from ddistill.cli.output import say
from ddistill.cli.study import decoder, models_of
from ddistill.evaluate.samplers import Sampler, start, student_sampler, teacher_sampler
from ddistill.integrators import dpmpp_2m
from ddistill.methods.base import sampling_of
from ddistill.previews import picture
from ddistill.runs import Opened, open_run

_MOST_GUIDANCE = 1000


class Asked(NamedTuple):
    """What the page asks for; None leaves gamma and guidance to the method, and labels to all classes in turn."""

    steps: int = 1
    teacher_steps: int = 8
    n: int = 16
    seed: int = 0
    gamma: float | None = None
    guidance: float | None = None
    label: int | None = None
    prompt: str = ""


class Drawn(NamedTuple):
    """Samples [n, ...], the seconds they took, and those that the program took before, to be compiled and run once."""

    x: np.ndarray
    seconds: float
    first: float | None


def drawer(
    opened: Opened, *, most: int, most_steps: int, models: Path | None = None
) -> Callable[[Asked], tuple[Drawn, Drawn]]:
    """What draws the student's and the teacher's samples from the same noise: those of `ddistill sample`.

    most, most_steps: limits of n and of steps. models: the pipeline's folder, where the run has prompts; ValueError
    where it is missing then. What it answers raises ValueError, in words, for what is out of range, and for what the
    student does not serve.
    """
    experiment, data = opened.experiment, opened.data
    process = experiment.process
    made = experiment.method(process)
    encode = None
    if data.null is not None:
        encode = prompt_encoder(models, data.to_unit(np.zeros((1, *data.shape), np.float32)).shape[1])
    samplers: dict[tuple, Sampler] = {}
    compiled: set[tuple] = set()

    def kept(key: tuple, make: Callable[[], Sampler]) -> Sampler:
        if key not in samplers:
            if len(samplers) >= 16:  # each holds a compiled program
                oldest = next(iter(samplers))
                del samplers[oldest]
                compiled.difference_update({entry for entry in compiled if entry[0] == oldest})
            samplers[key] = make()
        return samplers[key]

    def timed(key: tuple, sampler: Sampler, noise: Any, cond: Any, rng: Any) -> Drawn:
        first = None
        if (key, len(noise)) not in compiled:
            begin = time.monotonic()
            jax.block_until_ready(sampler.draw(noise, cond, rng).x)
            first = time.monotonic() - begin
            compiled.add((key, len(noise)))
        begin = time.monotonic()
        x = jax.block_until_ready(sampler.draw(noise, cond, rng).x)
        return Drawn(np.asarray(x), time.monotonic() - begin, first)

    def draw(asked: Asked) -> tuple[Drawn, Drawn]:
        _check("samples", asked.n, most)
        _check("steps of the student", asked.steps, most_steps)
        _check("steps of the teacher", asked.teacher_steps, most_steps)
        if not 0 <= asked.seed < 2**31:
            raise ValueError(f"the seed is {asked.seed}: give a number from 0 to {2**31 - 1}")
        if asked.gamma is not None and not 0 <= asked.gamma <= 1:
            raise ValueError(f"gamma is {asked.gamma}: it lies between 0 (nothing drawn anew) and 1 (all of it)")
        if asked.guidance is not None and not abs(asked.guidance) <= _MOST_GUIDANCE:
            raise ValueError(f"guidance is {asked.guidance}: give a scale up to {_MOST_GUIDANCE}; 1 is none")
        cond: Any
        noise, cond, rng = start(process, data.shape, data.num_classes, asked.n, asked.seed)
        if asked.label is not None:
            if not 0 <= asked.label < data.num_classes:
                accepted = f"labels are 0 to {data.num_classes - 1}" if data.num_classes else "this run has no classes"
                raise ValueError(f"the label is {asked.label}: {accepted}")
            cond = jnp.full(asked.n, asked.label)
        if encode is not None:
            cond = encode([asked.prompt] * asked.n)
        own = ("student", asked.steps, asked.gamma, asked.guidance)
        student = kept(
            own, lambda: student_sampler(opened.student, made, process, asked.steps, asked.gamma, asked.guidance)
        )
        net, _ = opened.guided_teacher(asked.guidance)
        other = ("teacher", asked.teacher_steps, asked.guidance)
        teacher = kept(other, lambda: teacher_sampler(net, process, dpmpp_2m, asked.teacher_steps, "teacher"))
        return timed(own, student, noise, cond, rng), timed(other, teacher, noise, cond, rng)

    return draw


def asked_of(
    steps: Any, teacher_steps: Any, n: Any, seed: Any, gamma: Any, guidance: Any, label: str | None, prompt: str | None
) -> Asked:
    """What the fields of the page hold; guidance: None where there is none. Raises ValueError for what is no number."""
    try:
        return Asked(
            int(steps), int(teacher_steps), int(n), int(seed), float(gamma),
            None if guidance is None else float(guidance),
            None if label in (None, "all") else int(label), prompt or "",
        )  # fmt: skip
    except (TypeError, ValueError, OverflowError) as error:  # None of a field that was cleared, infinity
        raise ValueError("every number of the page has to be given, and to be finite") from error


def words(name: str, steps: int, drawn: Drawn) -> str:
    """How long it took, in words."""
    each = 1000 * drawn.seconds / len(drawn.x)
    told = f"{name}, {steps} step{'s' * (steps != 1)}: {1000 * drawn.seconds:.1f} ms, {each:.2f} ms per sample"
    if drawn.first is None:
        return told
    return f"{told}; the first call, with compilation, took {drawn.first:.2f} s"


def page(opened: Opened, *, most: int, most_steps: int, models: Path | None = None) -> Any:
    """The page, a `gradio.Blocks`. Raises ImportError without gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs gradio: pip install 'ddistill[serve]'") from error
    experiment, data = opened.experiment, opened.data
    sampling = sampling_of(experiment.method(experiment.process))
    draw = drawer(opened, most=most, most_steps=most_steps, models=models)
    pad = np.zeros((1, *data.shape), np.float32) if "x" not in data.arrays else np.asarray(data.arrays["x"][:1000])
    prompts, scaled = data.null is not None, sampling.guidance is not None

    def called(steps, teacher_steps, n, seed, gamma, guidance, label, prompt):
        try:
            asked = asked_of(steps, teacher_steps, n, seed, gamma, guidance if scaled else None, label, prompt)
            student, teacher = draw(asked)
        except (ValueError, OSError, ImportError) as error:
            raise gradio.Error(str(error)) from error
        suffix = opened.guided_teacher(asked.guidance)[1]
        shown = [picture(drawn.x, data, pad) for drawn in (student, teacher)]
        student_image, teacher_image = (np.repeat(p, 3, axis=2) if p.shape[2] == 1 else p for p in shown)
        return (
            student_image, words("student", asked.steps, student),
            teacher_image, words(f"teacher, DPM-Solver++(2M){suffix}", asked.teacher_steps, teacher),
        )  # fmt: skip

    with gradio.Blocks(title=experiment.name, analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {experiment.name}")
        with gradio.Row():
            steps = gradio.Slider(1, most_steps, 1, step=1, label="steps of the student")
            teacher_steps = gradio.Slider(1, most_steps, min(8, most_steps), step=1, label="steps of the teacher")
            n = gradio.Slider(1, most, min(16, most), step=1, label="samples")
            seed = gradio.Number(0, precision=0, label="seed")
        with gradio.Row():
            gamma = gradio.Slider(0, 1, sampling.gamma, label="gamma")
            guidance = gradio.Number(sampling.guidance or 1.0, label="guidance", visible=scaled)
            labels = ["all", *map(str, range(data.num_classes))]
            label = gradio.Dropdown(labels, value="all", label="class", visible=data.num_classes > 0 and not prompts)
            prompt = gradio.Textbox("", label="prompt", visible=prompts)
        button = gradio.Button("Sample", variant="primary")
        with gradio.Row():
            with gradio.Column():
                left, left_words = gradio.Image(label="student", format="png"), gradio.Markdown()
            with gradio.Column():
                right, right_words = gradio.Image(label="teacher", format="png"), gradio.Markdown()
        given = [steps, teacher_steps, n, seed, gamma, guidance, label, prompt]
        button.click(
            called, given, [left, left_words, right, right_words], api_name="sample", concurrency_limit=1
        )  # one after the other, so that latencies are those of one call
    return blocks


def launch(blocks: Any, host: str, port: int | None, *, wait: bool) -> str:
    """Serve the page; answers its address, or with `wait` returns when it is stopped."""
    import gradio

    # Gradio's own come from Google.
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    theme = gradio.themes.Default(**fonts)
    at: dict[str, Any] = {"server_name": host, "server_port": port, "share": False, "quiet": True}
    if "theme" in gradio.Blocks.launch.__code__.co_varnames:  # since version 6
        at["theme"] = theme
    else:
        blocks.theme = theme
    _, url, _ = blocks.launch(**at, prevent_thread_lock=True, inbrowser=False)
    if wait:
        say(f"Serving on {url}; Ctrl-C ends it")
        blocks.block_thread()
    return url


def serve(command: Serve) -> None:
    """Open a run, and serve its page until Ctrl-C. Raises ValueError where samples are latents that nothing decodes."""
    for flag, number in (("most", command.most), ("most-steps", command.most_steps)):
        if number < 1:
            raise ValueError(f"--{flag} {number}: at least 1 is needed")
    if not 0 < command.port < 65536:
        raise ValueError(f"--port {command.port}: give a port from 1 to 65535")
    opened = open_run(command.run)
    models = models_of(opened, command.models)
    opened = opened._replace(data=dataclasses.replace(opened.data, to_unit=decoder(opened, models)))
    blocks = page(opened, most=command.most, most_steps=command.most_steps, models=models)
    launch(blocks, command.host, command.port, wait=True)


def _check(what: str, number: int, most: int) -> None:
    if not 1 <= number <= most:
        raise ValueError(f"{number} {what}: this page gives 1 to {most}")
