"""Ctrl-C and SIGTERM in a training: it is saved after the step that it is in, and left."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from ddistill.maintenance import noticed

RESTART = 75
"""The exit status of a run that was preempted: EX_TEMPFAIL, "try again later"."""


class Stopped(KeyboardInterrupt):
    """A training that was left because of a signal; status is the process's exit status, 75 for SIGTERM, or 130.

    together: all processes that JAX connects leave it at the same step.
    """

    def __init__(self, words: str, number: int | None = signal.SIGTERM, *, together: bool = False):
        super().__init__(words)
        self.status = 130 if number == signal.SIGINT else RESTART
        self.together = together


class Stop:
    """Whether a training is asked to stop. `on_signals` makes one that hears signals."""

    def __init__(self):
        self.signal: int | None = None
        self.watched = False
        self._asked = 0

    def request(self, number: int = signal.SIGTERM) -> None:
        """Ask for it, as a signal of this number does."""
        self.signal = number

    @contextmanager
    def watch(self) -> Iterator[None]:
        """While inside, signals wait for `now`; outside they stop the process where it is."""
        self.watched = True
        try:
            yield
        finally:
            self.watched = False

    def now(self) -> bool:
        """Whether to stop after this step; call it once a step.

        Processes that JAX connects learn it at the same step, whichever of them was told.
        """
        self._asked += 1  # not the training's step, which begins anew with each stage: JAX compares ever larger numbers
        if not _connected():
            return self.signal is not None
        from jax.experimental import multihost_utils

        if not multihost_utils.reached_preemption_sync_point(self._asked):
            return False
        self.signal = self.signal or signal.SIGTERM
        return True


@contextmanager
def on_signals() -> Iterator[Stop]:
    """A `Stop` that hears Ctrl-C and SIGTERM until the end of the block; a second one does not wait.

    Where processes are connected JAX is told, so that all learn it. Maintenance of a machine of Google's is heard as
    SIGTERM. In a thread other than the main one nothing is heard.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard = notice = False

    def maintained() -> None:
        nonlocal notice
        notice = True
        os.kill(os.getpid(), signal.SIGTERM)

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard, notice
        # The machine's own SIGTERM follows its notice, and is the first signal.
        again, heard, notice = heard, not notice, False
        # Where another process was told before, this one is leaving with it.
        waits = tell is not None and (stop.watched or stop.signal is not None)
        stop.request(number)
        if again or not waits:
            raise Stopped("stopped at once; what was saved before is there", number)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nStopping after this step, to save it. Once more: at once.\n")
        if tell is not None:
            tell(signal.SIGTERM)

    with ExitStack() as kept:
        tell = kept.enter_context(_handler_of_jax()) if _connected() else lambda number: None
        for number in (signal.SIGINT, signal.SIGTERM):
            kept.callback(signal.signal, number, signal.signal(number, hear))
        kept.enter_context(noticed(maintained))
        yield stop


@contextmanager
def _handler_of_jax() -> Iterator[Callable[[int], object] | None]:
    """What JAX does at SIGTERM where processes are connected, or None where it does not hear it.

    Python's `signal` neither answers a handler that C++ has set nor puts it back, as this does at the end.
    """
    ours = callable(signal.getsignal(signal.SIGTERM))
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    address = library.signal(signal.SIGTERM, None)
    try:
        none = ours or (address or signal.SIG_DFL) in (signal.SIG_DFL, signal.SIG_IGN)
        yield None if none else ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
    finally:
        library.signal(signal.SIGTERM, address)


def _connected() -> bool:
    import jax

    return jax.distributed.is_initialized()
