"""Compiling an experiment's programs for a TPU pod without a TPU, in a process of its own.

libtpu has the compiler; it is loaded once in a process, takes whole gigabytes and prints what nobody asked, so that it
runs in a child: `python -m ddistill.plan.aot REQUEST ANSWERS`.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddistill.plan.chips import Pod
from ddistill.plan.hlo import Collective


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program, for each chip.

    arguments, outputs, aliases, temporaries: bytes; outputs that lie where arguments were are aliases. code: bytes of
    the program. flops: the compiler's count, loops once. traffic: bytes to and from the memory. failed: why there is no
    program, where it is too large for the chip. needed: the bytes that it would take, if the compiler says so.
    """

    name: str
    seconds: float
    arguments: float = 0.0
    outputs: float = 0.0
    aliases: float = 0.0
    temporaries: float = 0.0
    code: float = 0.0
    flops: float = 0.0
    traffic: float = 0.0
    collectives: Mapping[str, Collective] = field(default_factory=dict)
    failed: str = ""
    needed: float = 0.0

    @property
    def memory(self) -> float:
        """What the program holds at its peak, bytes."""
        return self.needed or self.arguments + self.temporaries + self.outputs - self.aliases + self.code


def compiled(
    experiment: Path, flags: Sequence[str], pod: Pod, *, changes: Mapping[str, Any] | None = None, **options: Any
) -> Iterator[Compiled]:
    """Compile the programs of an experiment's file for a pod of TPUs; answers each as it is done.

    flags: as for `load_experiment`. changes: fields of the experiment, and "remat", set afterwards. options: as for
    `programs`, and only, "steps" or "sampler". Raises ImportError where libtpu is not installed, ValueError for
    topologies that it does not know, and RuntimeError where the compiler fails.
    """
    check_libtpu()
    request = {
        "experiment": str(experiment), "flags": list(flags), "topology": pod.topology, "changes": dict(changes or {}),
        "options": options,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        asked, answers, errors = (Path(folder) / name for name in ("request.json", "answers.jsonl", "errors.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        answers.touch()
        command = [sys.executable, "-m", "ddistill.plan.aot", str(asked), str(answers)]
        ours = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # which are for CPUs
        with errors.open("wb") as log:
            child = subprocess.Popen(
                command, env={**ours, **environment()}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            with answers.open(encoding="utf-8") as lines:
                while True:
                    over = child.poll() is not None
                    for line in lines.readlines():
                        yield _read(json.loads(line))
                    if over:
                        break
                    time.sleep(0.1)
        finally:
            child.kill()
            child.wait()
        if child.returncode:
            told = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(f"the compiler's process ended with status {child.returncode}: {' '.join(told[-3:])}")


def check_libtpu() -> None:
    """Raise ImportError where there is no compiler for TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("compiling for a TPU needs libtpu, which is not installed: pip install 'ddistill[tpu]'")


def environment() -> dict[str, str]:
    """The environment of a process that compiles: it looks for no TPU, and keeps nothing, as it could not be loaded."""
    return {
        "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_ENABLE_COMPILATION_CACHE": "false",
    }  # fmt: skip


def _read(line: dict[str, Any]) -> Compiled:
    if "error" in line:
        raise {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError}.get(line["type"], RuntimeError)(
            line["error"]
        )
    kinds = {kind: Collective(**c) for kind, c in line.pop("collectives").items()}
    return Compiled(**line, collectives=kinds)


def main(request: str, answers: str) -> None:
    """The child: read what is asked, compile, and write an answer a line."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    with Path(answers).open("a", encoding="utf-8") as out:

        def answer(line: dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        try:
            for one in _compile_all(asked):
                answer(dataclasses.asdict(one))
        except Exception as error:
            answer({"error": str(error), "type": type(error).__name__})


def _compile_all(asked: Mapping[str, Any]) -> Iterator[Compiled]:
    from ddistill.plan.changes import changed
    from ddistill.runs import load_experiment

    experiment = changed(load_experiment(Path(asked["experiment"]), asked["flags"]), asked["changes"])
    yield from compile_here(experiment, asked["topology"], **asked["options"])


def compile_here(experiment: Any, topology: str, *, only: str | None = None, **options: Any) -> Iterator[Compiled]:
    """Compile the programs of a `resolved` experiment in this process, which should be a child's; see `compiled`."""
    from ddistill.plan.programs import SAMPLER, mesh_of, programs

    mesh = mesh_of(_devices(topology), experiment)
    for program in programs(experiment, mesh, **options)[0]:
        if only is None or (program.stage == SAMPLER) == (only == SAMPLER):
            yield _compile(program)


def _devices(topology: str) -> list[Any]:
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if set(topology.partition(":")[2].split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:
        raise ValueError(f"libtpu knows no topology {topology}: {error}") from error


def _compile(program: Any) -> Compiled:
    from ddistill.plan import hlo

    begin = time.monotonic()
    lowered = program.trace().lower()
    try:
        done = lowered.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise RuntimeError(f"{program.name}: the compiler failed: {error}") from error
        return Compiled(program.name, time.monotonic() - begin, failed=_why(str(error)), needed=_needed(str(error)))
    seconds = time.monotonic() - begin
    memory, read = done.memory_analysis(), hlo.parse(done.as_text())
    return Compiled(
        program.name,
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        float((done.cost_analysis() or {}).get("flops", 0.0)),
        hlo.traffic(read),
        hlo.collectives(read),
    )


def _why(message: str) -> str:
    return " ".join(message.split("\n\n")[0].split())[:400]


def _needed(message: str) -> float:
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern in (
        r"Used ([\d.]+)([KMGT]) of",
        r"temporaries \(([\d.]+)([KMGT])\) exceeds",
        r"([\d.]+)([KMGT]) exceeds",
    ):
        if (match := re.search(pattern, message)) is not None:
            return float(match.group(1)) * units[match.group(2)]
    return 0.0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(*sys.argv[1:])
