#!/usr/bin/env python3
"""A stand-in for gcloud: TPU slices of two workers, each a folder in which commands are carried out.

State is in the folder FAKE_GCLOUD: calls (a line for each), requests/NAME and nodes/NAME (their states, one a line, of
which each look takes the first), NAME/worker-N (their homes). `refuse` in it makes every call fail. Flags are those of
Google Cloud CLI 528; others are refused as there.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["FAKE_GCLOUD"])
COMMON = ("--zone=", "--project=", "--format=", "--quiet")
CREATE = (*COMMON, "--accelerator-type=", "--spot", "--reserved", "--network=", "--async")
CONNECT = (*COMMON, "--worker=", "--internal-ip")
FLAGS = {
    ("tpu-vm", "create"): (*CREATE, "--version="),
    ("queued-resources", "create"): (*CREATE, "--node-id=", "--runtime-version=", "--valid-until-duration="),
    ("tpu-vm", "describe"): COMMON,
    ("queued-resources", "describe"): COMMON,
    ("tpu-vm", "delete"): COMMON,
    ("queued-resources", "delete"): (*COMMON, "--force"),
    ("tpu-vm", "ssh"): (*CONNECT, "--command="),
    ("tpu-vm", "scp"): CONNECT,
}


def error(words: str, status: int = 1) -> int:
    print(f"ERROR: (gcloud.compute.tpus) {words}", file=sys.stderr)
    return status


def state(kind: str, name: str, look: bool = True) -> str | None:
    """The first of the states that are noted, which is gone then unless it is the last."""
    path = FOLDER / kind / name
    if not path.exists():
        return None
    first, *others = path.read_text().split()
    if look and others:
        path.write_text("\n".join(others))
        if kind == "requests" and others[0] == "ACTIVE":
            make_node(name)
    return first


def put(kind: str, name: str, *states: str) -> None:
    path = FOLDER / kind / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(states))


def make_node(name: str) -> None:
    put("nodes", name, "READY")
    for worker in range(2):
        (FOLDER / name / f"worker-{worker}").mkdir(parents=True, exist_ok=True)


def remove_node(name: str) -> None:
    (FOLDER / "nodes" / name).unlink(missing_ok=True)
    shutil.rmtree(FOLDER / name, ignore_errors=True)


def describe(group: str, name: str, flags: argparse.Namespace) -> int:
    kind = {"tpu-vm": "nodes", "queued-resources": "requests"}[group]
    found = state(kind, name)
    if found is None:
        return error("NOT_FOUND: Resource was not found.")
    field = flags.format.removeprefix("value(").removesuffix(")")
    known = {
        "state": found,
        "state.state": found,
        "state.failedData.error.message": "no capacity before the deadline" if found == "FAILED" else "",
        "acceleratorType": (FOLDER / "type").read_text(),
    }
    print(known[field])
    return 0


def create(group: str, name: str, flags: argparse.Namespace) -> int:
    if state("requests", name, look=False) or state("nodes", name, look=False):
        return error("ALREADY_EXISTS")
    (FOLDER / "type").write_text(flags.accelerator_type)
    if group == "tpu-vm":
        make_node(name)
    else:
        put("requests", name, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    return 0


def delete(group: str, name: str, flags: argparse.Namespace) -> int:
    kind = {"tpu-vm": "nodes", "queued-resources": "requests"}[group]
    if state(kind, name, look=False) is None:
        return error("NOT_FOUND: Resource was not found.")
    remove_node(name)
    (FOLDER / "requests" / name).unlink(missing_ok=True)
    return 0


def homes(name: str, worker: str) -> list[Path]:
    every = sorted((FOLDER / name).glob("worker-*"))
    return every if worker == "all" else [every[int(worker)]]


def ssh(name: str, flags: argparse.Namespace) -> int:
    status = 0
    for home in homes(name, flags.worker):
        env = {**os.environ, "HOME": str(home)}
        done = subprocess.run(["bash", "-c", flags.command], cwd=home, env=env, check=False)
        status = status or done.returncode
    return status


def scp(source: str, target: str, flags: argparse.Namespace) -> int:
    name, _, path = target.partition(":")
    for home in homes(name, flags.worker):
        shutil.copy(source, home / path)
    return 0


def main() -> int:
    """What gcloud would answer."""
    with (FOLDER / "calls").open("a") as calls:
        calls.write(shlex.join(sys.argv[1:]) + "\n")
    if (FOLDER / "refuse").exists():
        return error("UNAVAILABLE: the service is not reached")
    words = [word for word in sys.argv[1:] if word != "alpha"]
    group, verb = words[2:4]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in FLAGS[group, verb]:
        if flag.endswith("="):
            parser.add_argument(flag[:-1], required=flag == "--zone=", default="0" if flag == "--worker=" else None)
        else:
            parser.add_argument(flag, action="store_true")
    if "alpha" in sys.argv:
        parser.add_argument("--tunnel-through-iap", action="store_true")
    parser.add_argument("names", nargs=2 if verb == "scp" else 1)
    flags = parser.parse_args(words[4:])
    if verb == "scp":
        return scp(*flags.names, flags)
    if verb == "ssh":
        if state("nodes", flags.names[0], look=False) != "READY":
            return error("the TPU is not READY")
        return ssh(flags.names[0], flags)
    return {"create": create, "describe": describe, "delete": delete}[verb](group, flags.names[0], flags)


if __name__ == "__main__":
    sys.exit(main())
