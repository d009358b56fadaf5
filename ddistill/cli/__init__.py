"""The command line. Nothing slow is imported until a command needs it, so that --help answers at once."""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args

import tyro
from tyro.conf import Positional, UseAppendAction, arg, subcommand

from ddistill.hosts import Busy, join, joined, leave, leaving_lost_peers
from ddistill.launchers import Peers
from ddistill.signals import Stop, on_signals
from ddistill.version import version


@dataclass(frozen=True)
class Quickstart:
    """Train a teacher on scanned digits, distil it, and put pictures and numbers beside each other: minutes.

    Any field of the experiment can be set as for `ddistill distill`, --network.width 128 for example.
    """

    out: Path = Path("quickstart")
    """The folder to write; started again in the same one, it resumes."""
    seed: int = 0
    """Of initial weights, batches and noise."""
    peers: Peers = field(default_factory=Peers)


@dataclass(frozen=True)
class Import:
    """Check a diffusers pipeline and copy it to a folder, as a teacher: network=Imported(FOLDER) in an experiment.

    Networks, and schedulers with the noise processes that they are of, are those of ddistill/hub/configs.py.
    """

    source: Annotated[Positional[str], arg(metavar="FOLDER_OR_HUB_ID")]
    """A pipeline's folder (scheduler/ and unet/ or transformer/), the id of one on the Hugging Face hub, a snapshot of
    EDM or EDM2 (.pkl), or with --original a checkpoint of DiT or SiT (.pt); nothing in these files is executed."""
    to: Annotated[Path, arg(metavar="FOLDER")]
    """The folder to write."""
    variant: Annotated[str | None, arg(metavar="fp16|bf16")] = None
    """The variant of the weights."""
    revision: Annotated[str | None, arg(metavar="NAME")] = None
    """The branch, tag or commit on the hub."""
    original: Annotated[Literal["dit", "sit"] | None, arg(metavar="dit|sit")] = None
    """The project whose checkpoint it is: DiT's and SiT's have the same tensors, and mean different things."""


@dataclass(frozen=True)
class Distill:
    """Train an experiment's teacher and distil it.

    Every field of the experiment is a flag, --optimizer.learning-rate 3e-4 for example; all of them:
    ddistill distill EXPERIMENT.py --help
    """

    experiment: Annotated[Positional[Path], arg(metavar="EXPERIMENT.py")]
    """A Python file with `def experiment() -> Experiment`; it comes before the flags."""
    workdir: Annotated[Path | None, arg(metavar="DIR")] = None
    """The folder for checkpoints and metrics, runs/NAME by default; a run that was interrupted goes on in it."""
    teacher_from: Annotated[Path | None, arg(metavar="RUN")] = None
    """Copy the teacher that RUN has trained, which must be the experiment's, instead of training it once more."""
    dry_run: bool = False
    """Train nothing: build all of it with shapes alone, trace its steps, and print networks, memory and batches."""
    devices: Annotated[int | None, arg(metavar="INT")] = None
    """With --dry-run, the number of devices to plan for, by default those that are here."""
    profile: Annotated[str | None, arg(metavar="FIRST:END")] = None
    """Write a profiler's trace of these steps of each stage to DIR/profile: 10:15 are steps 10 to 14, from 0 on."""
    peers: Peers = field(default_factory=Peers)


@dataclass(frozen=True)
class Plan:
    """Tell what an experiment takes on a pod before it is paid for: memory, time at the least, what bounds it, cost.

    Train steps and sampler are counted and, for TPUs, compiled by libtpu's compiler, which needs no TPU. Any field of
    the experiment can be set as for `ddistill distill`.
    """

    experiment: Annotated[Positional[Path], arg(metavar="EXPERIMENT.py")]
    """As for `ddistill distill`."""
    topology: Annotated[str, arg(metavar="CHIP:SHAPE")]
    """v5e:16x16, v6e:4x8, v5p:4x4x8 or v4:2x2x2; of GPUs, which are counted alone, their number: h100:8, h200, b200,
    a100-80."""
    price: Annotated[float | None, arg(metavar="FLOAT")] = None
    """What a chip costs for an hour, for the cost of a million images."""
    find: bool = False
    """Search batch, sharding and rematerialisation for the fastest that fits, and compile that and its neighbours."""
    keep_batch: bool = False
    """With --find, the batch stays as it is."""
    counted: bool = False
    """Compile nothing: all figures are counts and estimates, in seconds."""
    steps: int = 1
    """Sampling steps of the sampler."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write all figures there as well."""


@dataclass(frozen=True)
class Sample:
    """Sample from a finished run, into a picture or an array file."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder."""
    out: Annotated[Path, arg(metavar="FILE.png|.npz")]
    """A picture of all samples side by side, or arrays x [n, ...] and labels [n]."""
    steps: int = 1
    """Sampling steps: network calls."""
    n: int = 64
    """Number of samples."""
    label: Annotated[int | None, arg(metavar="INT")] = None
    """The class of all samples; by default all classes in turn."""
    seed: int = 0
    """Of the noise."""
    gamma: Annotated[float | None, arg(metavar="FLOAT")] = None
    """0 jumps from time to time, 1 jumps to the data and adds noise again; by default as the method is meant to."""
    guidance: Annotated[float | None, arg(metavar="FLOAT")] = None
    """The guidance scale, for students that take one; 1 is none."""
    teacher: bool = False
    """Sample from the teacher, guided as the student's method sees it, with DPM-Solver++(2M), not from the student."""
    prompts: Annotated[Path | None, arg(metavar="FILE")] = None
    """Prompts of the samples in turn, one in a line, where conditions are prompts; by default the data's own."""
    models: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """The pipeline that decodes latents and encodes prompts; by default the teacher's, where it was imported whole."""
    peers: Peers = field(default_factory=Peers)


@dataclass(frozen=True)
class Serve:
    """Serve a local page on which a finished run's student is sampled beside its teacher. Needs the extra `serve`."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 lets other machines in, all who can reach it: there is no password."""
    port: int = 7860
    """The port to listen on."""
    most: int = 64
    """Samples that one call may ask for."""
    most_steps: int = 64
    """Sampling steps that one call may ask for."""
    models: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """The pipeline's folder that encodes prompts and decodes latents, where the run has them."""


@dataclass(frozen=True)
class Export:
    """Write the student of a run as a diffusers folder, with the scheduler that samples it and a model card.

    The run's teacher must be a network that diffusers has: imported, or of a configuration in ddistill/networks.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder."""
    to: Annotated[Path, arg(metavar="FOLDER")]
    """The folder to write."""
    steps: int = 1
    """Sampling steps that the scheduler and the card are for."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the weights."""
    guidance: Annotated[float | None, arg(metavar="FLOAT")] = None
    """The guidance scale to build in, for students that take one; by default as the method is meant to."""
    lora: Annotated[int | None, arg(metavar="RANK")] = None
    """Write what was learned as a LoRA file of this rank, that of the method's adapter, not the whole network."""
    drop_target: bool = False
    """Leave out what a student learned of the time it jumps to, which diffusers' networks do not read."""


@dataclass(frozen=True)
class Evaluate:
    """Judge the teacher and the student of a run: quality, variety and speed, beside real images as the floor.

    Runs on digits are judged by their pixels, with the table of the quickstart. With --features any run whose samples
    are images, or latents of them, is judged by networks' features: FID and the like. A command that was cut off goes
    on from the last row when it is repeated.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder."""
    steps: Annotated[tuple[int, ...] | None, arg(metavar="INT INT …")] = None
    """Numbers of sampling steps, of the student and of the teacher beside it; by default those of 1, 2, 4 and 8 that
    the student serves."""
    features: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NETWORK=FILE")] = ()
    """Published weights of a network, a file or a model's folder: inception=pt_inception-2015-12-05-6726825d.pth,
    clip-vit-l-14-336=FOLDER, dinov2-vit-l-14=dinov2_vitl14_pretrain.pth, lpips-vgg16=vgg16-397923af.pth,vgg.pth. Once
    for each network."""
    metrics: Annotated[str | None, arg(metavar="fid,kid,…")] = None
    """fid, sfid, kid, is, precision, recall, density and coverage (Inception), fd_dinov2 (DINOv2), cmmd and clip_score
    (CLIP), lpips, the distance of samples of one condition; by default all that the networks allow."""
    prompts: Annotated[Path | None, arg(metavar="FILE.txt")] = None
    """A prompt in each line, which samples have in turn: for clip_score. The pipeline in --models encodes them; a run
    on classes takes one for each class. By default the conditions of the data."""
    reference: Annotated[Path | None, arg(metavar="PATH")] = None
    """Real images: a folder, tar files, .npy or .npz with bytes, or statistics, .npz of this command or in the format
    of ADM and EDM; by default the run's data."""
    crop: bool = False
    """Cut larger reference images to their middle square, and resize them, as for training."""
    samples: Annotated[int | None, arg(metavar="INT")] = None
    """Samples of each sampler: 50,000 by default, 2,000 for the pixels of digits."""
    batch_size: int = 64
    """Samples at a time, on all devices together."""
    seed: int = 0
    """Of noise, conditions and random subsets."""
    teacher_steps: int = 18
    """Steps of the teacher's usual sampler."""
    integrator: Literal[
        "ddim", "deis", "dpmpp_2m", "dpmpp_2s", "dpmpp_3m", "dpmpp_3s", "euler", "heun", "rk4", "unipc",
    ] = "heun"  # fmt: skip
    """The teacher's usual sampler; with as few steps as the student it is sampled by DPM-Solver++(2M)."""
    models: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """A pipeline's folder, or its autoencoder's, to decode latents; by default the data's or the teacher's."""
    resize: Annotated[
        Literal["clean", "pytorch-fid", "tensorflow"] | None, arg(metavar="clean|pytorch-fid|tensorflow")
    ] = None
    """How images are resized for Inception: as Clean-FID does, by default, or as pytorch-fid or the first FID, that of
    ADM's and EDM's statistics and the default beside these. Numbers of different ways do not compare."""
    likelihood: bool = False
    """On digits, add the negative log-likelihood of samples under the teacher, in bits per pixel: a minute more."""
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """The folder of rows.jsonl, table.json, table.csv and the reference's statistics; RUN/evaluation by default with
    --features, and none for digits."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the table there as well."""
    csv: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the table there as well."""
    peers: Peers = field(default_factory=Peers)


@dataclass(frozen=True)
class Methods:
    """List the methods: their names, papers and files."""


@dataclass(frozen=True)
class Bench:
    """Run a benchmark whose right answers are known.

    exact: distil teachers in closed form, Gaussian mixtures, and compare the students with the truth.
    """

    which: Positional[Literal["exact"]]
    """The benchmark."""
    methods: str = "all"
    """Names of `ddistill methods`, separated by commas, or all."""
    mixture: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME_OR_FILE")] = ()
    """ring8, grid25, digits or an .npz file (weights, means, covariances and perhaps labels); by default all three."""
    seeds: int = 1
    """Repetitions, each with its own network and noise."""
    jobs: int = 1
    """Students to train at a time, each in a process of its own; on a CPU no more than its cores."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the rows there, anew after each one; a method whose rows it has already is not measured again."""
    page: Annotated[Path | None, arg(metavar="FILE.md")] = None
    """Write all rows, those that --json had included, as a page of tables."""


@dataclass(frozen=True)
class Report:
    """Write one page on runs, or on rows of the benchmark: tables, samples from the same noise, plots, commands.

    The page is one file that opens from disk and asks for nothing else. Needs the extra `report`.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN|ROWS.json")]
    """Folders of runs, folders of such folders, and files of rows that bench, evaluate and compare wrote. Results that
    `ddistill evaluate RUN --json RUN/evaluate.json` left in a run's folder are its table."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("report")
    """The folder of the page, index.html."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of sampling steps of the samples; those that a student does not serve are left out."""
    samples: int = 36
    """Images of each sampler and number of steps; of data in two dimensions twelve times as many points."""
    seed: int = 0
    """Of the noise, the same for all."""
    limit: float = 24.0
    """Megabytes that samples may take; where they would take more, fewer are shown, and the page says so."""
    prompts: Annotated[Path | None, arg(metavar="FILE.txt")] = None
    """A prompt in each line, which samples of runs on prompts have in turn; by default prompts of their data."""
    models: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """The pipeline's folder that encodes prompts and decodes latents, of all runs on latents; by default each run's,
    its data's or its teacher's."""
    title: str = ""
    """The page's title."""


@dataclass(frozen=True)
class Compare:
    """Train one teacher on digits, distil it with every experiment, and write one table of them all."""

    experiments: Annotated[Positional[tuple[Path, ...]], arg(metavar="EXPERIMENT.py")]
    """Experiment files that agree in all that makes their teacher."""
    out: Annotated[Path, arg(metavar="FILE.md")] = Path("digits.md")
    """The page to write; beside it go the rows as .json and a picture of precision against recall as .png."""
    workdir: Annotated[Path, arg(metavar="DIR")] = Path("runs/compare")
    """The folder of the runs, one for each experiment, under its name; started again in the same one, it resumes."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Numbers of sampling steps."""


@dataclass(frozen=True)
class Pairs:
    """Make teacher pairs (noise, where the teacher takes it) and store them in a folder, from which students learn.

    The teacher is that of a finished run, guided as the run's method sees it. A command that was cut off goes on when
    it is repeated.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder."""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """The folder of the store."""
    count: int
    """The number of pairs; a larger one adds to a store that is there."""
    steps: int = 22
    """Steps of the integrator for each pair, at least."""
    integrator: Literal[
        "ddim", "ddpm", "deis", "dpm_solver_2", "dpm_solver_3", "dpmpp_2m", "dpmpp_2s", "dpmpp_3m", "dpmpp_3s", "euler",
        "euler_maruyama", "heun", "heun_churn", "predictor_corrector", "rk4", "sde_dpmpp_2m", "unipc",
    ] = "dpmpp_3s"  # fmt: skip
    """Those that use earlier steps (such as dpmpp_3m, 64 steps) start anew at each point: best with --points 0."""
    points: int = 8
    """Intervals of the stored trajectory, as many as the steps of the students to come; 0 stores its ends alone."""
    seed: int = 0
    """Of noise and labels."""
    shard_size: int = 4096
    """Pairs in a file."""
    peers: Peers = field(default_factory=Peers)


@dataclass(frozen=True)
class Encode:
    """Encode images, and their prompts, with the models of a diffusers pipeline, for training on latents.

    In an experiment the folder is data=LatentFolder(FOLDER). Images that cannot be read are left out and named. A
    command that was cut off goes on when it is repeated.
    """

    data: Annotated[Positional[Path], arg(metavar="DATA")]
    """A folder of images, tar files in WebDataset's layout, or .npy or .npz with bytes [N, size, size, channels]."""
    to: Annotated[Path, arg(metavar="FOLDER")]
    """The folder to write."""
    models: Annotated[Path, arg(metavar="FOLDER")]
    """The pipeline's folder, with vae/ and text encoders, or an autoencoder's own."""
    size: int = 256
    """The side of the middle square that images are cut to, in pixels."""
    flat: bool = False
    """The folders in DATA are no classes."""
    prompts: Annotated[str, arg(metavar="beside|FILE")] = "none"
    """NAME.txt beside NAME.jpg, in tar files too; or a file, .txt with one line for each image in order, or .jsonl."""
    mirrored: bool = False
    """Encode mirror images too."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of what is stored."""
    bfloat16: bool = False
    """The models compute in bfloat16."""
    variant: Annotated[str | None, arg(metavar="fp16|bf16")] = None
    """The variant of the models' weights."""
    batch_size: int = 16
    """Images encoded at a time."""
    shard_size: int = 1024
    """Images in a file."""
    peers: Peers = field(default_factory=Peers)


@dataclass(frozen=True)
class Invert:
    """Encode data to noise with a finished run, decode it again, and print how far the round trip misses.

    The run's student must be invertible (method `invertible`); with --teacher any run will do.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder."""
    input: Annotated[str, arg(metavar="FILE.npz|digits")]
    """Arrays x [N, ...] in the data's scale, and labels [N] where the run has classes; or the held-out scans."""
    out: Annotated[Path, arg(metavar="FILE.png|.npz")]
    """A picture of inputs, reconstructions and edits, or arrays x, noise, reconstruction, edit, labels, edit_labels."""
    steps: int | None = None
    """Network calls each way, 4 by default; with --teacher steps of the integrator, 50 by default."""
    to_label: Annotated[int | None, arg(metavar="INT")] = None
    """Decode to this class as well."""
    n: int = 20
    """Number of inputs, from the first on."""
    teacher: bool = False
    """Use the teacher, under Heun's method, and not the student."""


Command = (
    Annotated[Quickstart, subcommand("quickstart")]
    | Annotated[Import, subcommand("import")]
    | Annotated[Distill, subcommand("distill")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Pairs, subcommand("pairs")]
    | Annotated[Encode, subcommand("encode")]
    | Annotated[Sample, subcommand("sample")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Invert, subcommand("invert")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Methods, subcommand("methods")]
    | Annotated[Bench, subcommand("bench")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; answers the exit status: 0, 2 for an error that words explain, 130 for Ctrl-C, 75 for SIGTERM.

    75 is also that of a folder in which another command trains. With --debug, or DDISTILL_DEBUG set, errors show where
    they come from.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or bool(os.environ.get("DDISTILL_DEBUG"))
    argv = [a for a in argv if a != "--debug"]
    if argv == ["--version"]:
        print(f"ddistill {version()}")
        return 0
    command, flags = _parse(argv)
    _cache_compilations()
    _enough_threads()
    try:
        peers: Peers | None = getattr(command, "peers", None)
        if peers is not None and not getattr(command, "dry_run", False) and not {"-h", "--help"} & set(flags):
            join(peers)
        hears = peers is not None or isinstance(command, Compare)
        with on_signals() if hears else nullcontext(Stop()) as stop, leaving_lost_peers():
            from ddistill.cli import commands

            commands.run(command, flags, stop)
        return 0
    except KeyboardInterrupt as stopped:
        print(f"\nInterrupted{f': {stopped}' * bool(str(stopped))}. {_how_to_go_on(command)}", file=sys.stderr)
        return leave(stopped, getattr(stopped, "status", 130))
    except BrokenPipeError:  # the reader of a pipe has gone, as in `ddistill methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        worded = not debug and _in_words(error)
        if not worded and not joined():
            raise
        print(f"ddistill: {error}" if worded else traceback.format_exc(), file=sys.stderr)
        return leave(error, error.status if isinstance(error, Busy) else 2 if worded else 1)


def _parse(argv: list[str]) -> tuple[Command, list[str]]:
    """The command, and the flags that it leaves to the experiment."""
    help_of_experiment = argv[:1] == ["distill"] and len(argv) > 2 and not argv[1].startswith("-")
    asked = [a for a in argv if a in ("-h", "--help")] if help_of_experiment else []
    argv = [a for a in argv if a not in asked]

    names = [get_args(kind)[1].name for kind in get_args(Command)]
    if argv and not argv[0].startswith("-") and argv[0] not in names:
        _refuse(f"no command {argv[0]!r}{_meant(argv[0], names)} There are {', '.join(names)}")
    command, unknown = tyro.cli(
        Command,
        args=argv,
        prog="ddistill",
        description="Distil diffusion models: a slow teacher becomes a student that samples in one to four steps. "
        "--version tells the version; with --debug errors show where they come from.",
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.FlagCreatePairsOff,
        ),
        return_unknown_args=True,
    )
    if unknown and not isinstance(command, Distill | Plan | Quickstart):
        flags = [f"--{f.name.replace('_', '-')}" for f in fields(command) if f.name != "peers"]
        meant = _meant(unknown[0], flags)
        _refuse(f"{argv[0]} does not take {' '.join(unknown)}{meant} All that it takes: ddistill {argv[0]} --help")
    return command, [*unknown, *asked]


def _refuse(words: str) -> NoReturn:
    print(f"ddistill: {words}", file=sys.stderr)
    raise SystemExit(2)


def _meant(given: str, names: Sequence[str]) -> str:
    near = get_close_matches(given, names, 1)
    return f": did you mean {near[0]}?" if near else "."


def _cache_compilations() -> None:
    """Let JAX keep what it compiles between commands, in the user's cache folder."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddistill" / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written is no reason to fail
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def _enough_threads() -> None:
    """On a CPU split into many devices, XLA's all-reduces wait for each other in as many threads as there are cores."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("NPROC", "64")


def _how_to_go_on(command: Command) -> str:
    if isinstance(command, Distill | Quickstart | Compare):
        return "The same command goes on from the last checkpoint."
    if isinstance(command, Pairs | Encode):
        return "The same command goes on from the last whole shard."
    if isinstance(command, Evaluate) and (command.features or command.out is not None):
        return "The same command goes on after the last row."
    if isinstance(command, Bench) and command.json is not None:
        return f"The rows that were done are in {command.json}."
    return "Nothing was kept."


def _in_words(error: Exception) -> bool:
    """Whether the error's message is meant for users."""
    from ddistill.checkpoint import CheckpointError
    from ddistill.divergence import DivergedError

    return isinstance(error, ValueError | OSError | ImportError | Busy | CheckpointError | DivergedError)
