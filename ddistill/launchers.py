"""Which processes run a command together, by its flags and by what launchers leave in the environment.

SLURM, Open MPI, Kubernetes and TPU pods; nothing is asked over the network here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, NamedTuple

from tyro.conf import arg


@dataclass(frozen=True)
class Peers:
    """The processes that run this command together, one on each host.

    On TPU pods, under SLURM's srun, Open MPI's mpirun and in Kubernetes' indexed jobs they find each other.
    """

    processes: Annotated[int | None, arg(metavar="INT")] = None
    """Their number; 1 runs alone where others would be found. DDISTILL_PROCESSES in the environment says it too."""
    process: Annotated[int | None, arg(metavar="INT")] = None
    """The number of this one, from 0 on, where no launcher says it. DDISTILL_PROCESS in the environment."""
    coordinator: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Where process 0 is reached by all: a free port of its host. DDISTILL_COORDINATOR in the environment."""
    join_timeout: Annotated[int, arg(metavar="SECONDS")] = 300
    """How long to wait for the others to start."""
    heartbeat: Annotated[int, arg(metavar="SECONDS")] = 60
    """After how long without a sign of life another process counts as dead, which ends all of them."""


class Cluster(NamedTuple):
    """What `jax.distributed.initialize` is to be told; without an address JAX asks the cluster itself."""

    name: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: list[int] | None = None


def found(peers: Peers, environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that flags, DDISTILL_* or a launcher's variables tell of; None where the process is alone.

    Raises ValueError where they are incomplete or contradict each other.
    """
    processes = _number("processes", peers.processes, environment)
    process = _number("process", peers.process, environment)
    coordinator = peers.coordinator or environment.get("DDISTILL_COORDINATOR")
    if processes == 1:
        return None
    launched = _slurm(environment) or _open_mpi(environment)
    if (processes, process, coordinator) == (None, None, None):
        if launched is not None and launched.coordinator is None:
            raise ValueError(
                f"{launched.name} started {launched.processes} processes and does not say where the first one is: give "
                "--coordinator HOST:PORT (or DDISTILL_COORDINATOR), or --processes 1 to run each alone"
            )
        return launched or _asked_by_jax(environment)
    known = launched or Cluster("the flags", process=_job_index(environment))
    processes = known.processes if processes is None else processes
    process = known.process if process is None else process
    coordinator = known.coordinator if coordinator is None else coordinator
    given = {"--processes": processes, "--process": process, "--coordinator": coordinator}
    missing = [flag for flag, value in given.items() if value is None]
    if missing or processes is None or process is None or coordinator is None:
        raise ValueError(
            f"to join processes by hand give --processes, --process and --coordinator; missing: {', '.join(missing)}"
        )
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(f"--process {process} of --processes {processes}: processes are numbered from 0 on")
    if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\s/]+):\d+", coordinator):
        raise ValueError(f"--coordinator {coordinator}: give HOST:PORT, such as 10.0.0.2:8476")
    return Cluster(known.name, coordinator, processes, process, known.devices)


def _number(name: str, flag: int | None, environment: Mapping[str, str]) -> int | None:
    variable = f"DDISTILL_{name.upper()}"
    if flag is not None or not (text := environment.get(variable)):
        value, what = flag, f"--{name}"
    elif not text.strip().isdigit():
        raise ValueError(f"{variable}={text}: a whole number is wanted")
    else:
        value, what = int(text), variable
    if name == "processes" and value is not None and value < 1:
        raise ValueError(f"{what} {value}: at least 1 is needed")
    return value


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    """The tasks of a step that srun started; a batch script and an interactive shell are not such tasks."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environment for name in names):
        return None
    job, nodes, tasks, process, local = (environment[name] for name in names)
    if int(tasks) < 2:
        return None
    # rack[1-2]node[001-015,17]-ib,other: of each pair of brackets the first name, up to the first comma outside.
    host = re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", nodes).partition(",")[0]
    step = environment.get("SLURM_STEP_ID", "0")
    port = 61440 + (int(job) + 97 * (int(step) if step.isdigit() else 0)) % 4096
    here = _tasks_on_each(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return Cluster("SLURM", f"{host}:{port}", int(tasks), int(process), _devices(int(local), here, environment))


def _open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    if any(name not in environment for name in names) or int(environment[names[0]]) < 2:
        return None
    count, process, local = (int(environment[name]) for name in names)
    here = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "2"))
    # Of the form 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911; only Open MPI before 5 says where it is.
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    address = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    host, port = None, 61440
    if address is not None:
        host = address[1] or f"[{address[2]}]"
        port += int(uri.partition(".")[0]) // 4096 % 4096
    elif here == count:
        host = "localhost"
        port += sum(map(ord, environment.get("PMIX_NAMESPACE", ""))) * 31 % 4096
    coordinator = None if host is None else f"{host}:{port}"
    return Cluster("Open MPI", coordinator, count, process, _devices(local, here, environment))


def _asked_by_jax(environment: Mapping[str, str]) -> Cluster | None:
    """A TPU pod or a job of Kubernetes, whose processes JAX asks their servers for."""
    platforms = environment.get("JAX_PLATFORMS", "")
    named = any(name in environment for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    # Importing JAX sets TPU_SKIP_MDS_QUERY where there is no TPU.
    chips = named or "TPU_SKIP_MDS_QUERY" not in environment
    if (not platforms or "tpu" in platforms) and chips and find_spec("libtpu") is not None:
        return Cluster("the TPU pod")
    if "KUBERNETES_SERVICE_HOST" in environment and _job_index(environment) is not None:
        if find_spec("kubernetes") is None:
            raise ValueError(
                "this is an indexed job of Kubernetes, whose processes JAX finds with the package kubernetes: "
                'pip install "jax[k8s]"; or give --processes and --coordinator (DDISTILL_PROCESSES, '
                "DDISTILL_COORDINATOR), or --processes 1 to run each alone"
            )
        return Cluster("the Kubernetes job")
    return None


def _job_index(environment: Mapping[str, str]) -> int | None:
    index = environment.get("JOB_COMPLETION_INDEX", "")
    return int(index) if index.isdigit() else None


def _tasks_on_each(text: str) -> int:
    """The largest number in SLURM's list of tasks on each node, such as 2(x3),1."""
    return max((int(n) for n in re.findall(r"(?:^|,)(\d+)", text)), default=1)


def _devices(local: int, here: int, environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of one of several processes on a host; None for all that it sees.

    One each where all processes see all of them; those that a launcher bound to some keep these.
    """
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
    if here < 2 or 0 < len(visible) < here:
        return None
    return [local]
