"""The processes that run one command together: how they join, which writes, what they agree on, how they leave.

Nothing slow is imported until processes are joined.
"""

import contextlib
import fcntl
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddistill.launchers import Cluster, Peers, found
from ddistill.signals import RESTART, on_signals

PATIENCE = 5.0
"""Seconds that a process which leaves by itself waits for others that leave as well."""


class Busy(RuntimeError):
    """What this command needs another one has; status is the process's exit status, which asks for a later try."""

    status = RESTART


def join(peers: Peers, environment: Mapping[str, str] | None = None) -> bool:
    """Join the processes of this command, if there are others; answers whether it did. Call it before JAX is used.

    Where peers are missing for `join_timeout` seconds the process ends, with status 75, which asks for another try:
    JAX, whose client aborts the process, leaves no other way. Raises ValueError as `found`, and Stopped at a signal
    while the processes tell each other their devices.
    """
    import jax

    cluster = found(peers, os.environ if environment is None else environment)
    if cluster is None or jax.distributed.is_initialized():
        return cluster is not None

    def missing() -> None:
        print(_missing(cluster, peers.join_timeout), file=sys.stderr, flush=True)
        os._exit(RESTART)

    options: dict[str, Any] = {}
    if cluster.coordinator is not None:
        options = {
            "coordinator_address": cluster.coordinator, "num_processes": cluster.processes,
            "process_id": cluster.process, "local_device_ids": cluster.devices,
            "cluster_detection_method": "deactivate",
        }  # fmt: skip
    timer = threading.Timer(peers.join_timeout, missing)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=peers.join_timeout + 60, heartbeat_timeout_seconds=peers.heartbeat,
            shutdown_timeout_seconds=max(60, peers.heartbeat), **options,
        )  # fmt: skip
        with on_signals():  # which JAX now hears in their place, and tells a training alone
            _aside(jax.device_count)  # the devices of all are made known to all, which waits for all
    except ValueError as error:  # of a cluster that JAX does not see as one
        if cluster.coordinator is not None or "should be defined" not in str(error):
            raise
        return False
    finally:
        timer.cancel()
    return True


def _aside(work: Callable[[], Any]) -> None:
    """Call it in a thread, so that this one hears signals while the other waits in compiled code."""
    failures: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def first() -> bool:
    """Whether this process writes what only one may write."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def done_by_first(work: Callable[[], None]) -> None:
    """Let process 0 do something while the others wait; all raise where it failed, as `checked_by_all`, in its words.

    What it wrote before can then be read by all who share the file system.
    """
    import jax

    checked_by_all(lambda: work() if jax.process_index() == 0 else None)


def checked_by_all(check: Callable[[], None]) -> None:
    """Call it in all processes, each of which waits for the others and raises what it or the first other one raised.

    OSError and Busy stay what they are, what others raised is ValueError besides, in the same words.
    """
    failure: Exception | None = None
    try:
        check()
    except Exception as error:
        failure = error
    kinds: dict[str, type[Exception]] = {"O": OSError, "B": Busy, "V": ValueError}
    letter = next((letter for letter, kind in kinds.items() if isinstance(failure, kind)), "V")
    told = said_by_all("" if failure is None else f"{letter}{failure}")
    if failure is not None:
        raise failure
    for words in filter(None, told):
        raise kinds[words[0]](words[1:])


def said_by_all(text: str) -> list[str]:
    """What each process says, in all processes, all of which call this."""
    import jax

    if jax.process_count() == 1:
        return [text]
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    content = text.encode()[:4000]
    row = np.zeros(4002, np.uint8)  # of one shape, whatever is said, so that it is compiled once
    row[:2] = divmod(len(content), 256)
    row[2 : 2 + len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(process_allgather(row))
    return [bytes(r[2 : 2 + int(r[0]) * 256 + int(r[1])]).decode(errors="ignore") for r in rows]


def in_any(value: bool) -> bool:
    """Whether it is so in any of the processes, all of which call this."""
    return any(said_by_all("1" if value else ""))


@contextmanager
def leaving_lost_peers() -> Iterator[None]:
    """End the process with status 75 and words where an error within means that another process is gone.

    Python's own end would wait for the one that is lost.
    """
    try:
        yield
    except Exception as error:
        if not lost_peer(error):
            raise
        print(
            f"ddistill: another process of this run is gone ({str(error).strip().splitlines()[0][:200]}). Start all "
            "of them again: they go on from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        sys.stdout.flush()
        os._exit(RESTART)


def joined() -> bool:
    """Whether this process has joined others."""
    jax = sys.modules.get("jax")  # Ctrl-C may have come before
    return jax is not None and jax.distributed.is_initialized()


def leave(why: BaseException, status: int) -> int:
    """The exit status of a command that a signal or an error has ended.

    Where it may be so in this process alone, it ends here: Python's own end would wait for the others, and they for
    this one. That they see it is gone ends them.
    """
    if getattr(why, "together", False) or not joined():
        return status
    jax = sys.modules["jax"]

    def disconnect() -> None:  # when all others do
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()

    thread = threading.Thread(target=disconnect, name="leave", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def alone_in(folder: Path, tell: Callable[[str], None]) -> Iterator[bool]:
    """Keep other commands out of a folder on disk while inside, by a lock that ends with the process, however it ends.

    Called by process 0 alone; gives whether the lock is held. Commands of another host are not kept out, since a host
    that is lost may leave its locks on a shared disk: of them `tell` is told in words. Where the disk knows no locks
    nothing is kept out.
    Raises Busy where a process of this host is inside, OSError where the folder cannot be written.
    """
    here, held = _host(), False
    with (folder / ".lock").open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
            file.truncate(0)
            file.write(f"{os.getpid()} {here}\n".encode())
        except BlockingIOError:
            file.seek(0)
            pid, _, there = file.read().decode(errors="replace").strip().partition(" ")
            who = f"another process{f', {pid},' * bool(pid)}"
            if there in ("", here):
                raise Busy(
                    f"{who} is training in {folder}: wait for its end{f' or stop it, kill {pid},' * bool(pid)} and "
                    "repeat the command, or give another folder"
                ) from None
            tell(f"{who} is training in {folder} on another host, unless that is lost: stop one of the two")
        except OSError:  # no locks, or no room to write who holds this one
            pass
        yield held


def _host() -> str:
    """What tells a running machine from others, and from itself before it was started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def lost_peer(error: BaseException) -> bool:
    """Whether an error of JAX, or one that it caused, means that the connection to another process broke."""
    import jax

    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return False
    chain: BaseException | None = error
    seen = set[int]()
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        pattern = _LOST if isinstance(chain, jax.errors.JaxRuntimeError) else _COLLECTIVE
        if re.search(pattern, str(chain)):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


_COLLECTIVE = r"^[A-Z_]+: Gloo \w+ failed"
"""What JAX raises as ValueError, where one is compiled and run at once."""

_LOST = (
    r"(?i)connection (closed|reset|refused)|broken pipe|UNAVAILABLE|DEADLINE_EXCEEDED|socket closed|timed out"
    r"|heartbeat|another task died|coordination service"
)


def _missing(cluster: Cluster, seconds: int) -> str:
    if cluster.coordinator is None:
        return (
            f"ddistill: after {seconds} s not all processes of {cluster.name} had started this command: it has to run "
            "on every host at once"
        )
    if cluster.process == 0:
        who = f"process 0 waits at {cluster.coordinator} for {(cluster.processes or 1) - 1} others, and not all came"
    else:
        who = (
            f"process {cluster.process} of {cluster.processes} waits for process 0 at {cluster.coordinator}, which is "
            "not there, or waits for others"
        )
    return (
        f"ddistill: after {seconds} s {who}. Start the command with the same --processes and --coordinator and numbers "
        f"from 0 to {(cluster.processes or 1) - 1} everywhere, see that the port is open between the hosts, or wait "
        "longer with --join-timeout"
    )
