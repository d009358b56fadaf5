"""Tests run on CPU with eight virtual devices, in float32 unless a test takes the `x64` fixture."""

import importlib.util
import os
import tempfile
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile thousands of programs and run each of them once, so LLVM's optimisations cost more than they save, XLA's
# fusion emitters, through MLIR, take twice the time of the emitters of single instructions, and code in 32 parts for as
# many threads takes a quarter more than in one. XLA aborts where it does not know a flag, and later versions do not
# know the emitters'.
_flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    _flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
for _flag in _flags:
    if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
# XLA's CPU threads wait inside all-reduces: with as many threads as two cores give, eight devices block each other
# until XLA aborts the process after 40 s.
os.environ["NPROC"] = "64"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "ddistill-test-cache"))
# Most of the time goes into thousands of small compilations: keep them all.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402

from ddistill import sharding  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="with torch: write tests/references anew")


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason="torch is not installed"))


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def one_device():
    """Trainings use one of the eight devices, for tests that are not about many: these compile in less time."""
    mesh = sharding.local_mesh(jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda fsdp=1, tensor=1: mesh)
        yield mesh
