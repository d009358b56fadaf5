"""The manifest for Kubernetes against what the command looks for and answers."""

from pathlib import Path

import pytest

from ddistill.launchers import Cluster, Peers, found
from ddistill.signals import RESTART

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
FILE = Path(__file__).parents[1] / "experiments" / "jobset.yaml"


def test_the_nodes_of_the_manifest_find_each_other_and_are_begun_again_after_the_statuses_that_ask_for_it():
    manifest = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    name, (workers,) = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    count = job["completions"]
    assert count == job["parallelism"] and job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    for index in range(count):  # Kubernetes numbers the pods of an indexed job, and JobSet names the first so
        joined = found(Peers(), {**environment, "JOB_COMPLETION_INDEX": str(index)})
        assert joined == Cluster("the flags", f"{name}-{workers['name']}-0-0.{name}:8476", count, index)
    ended, gone = job["podFailurePolicy"]["rules"]
    assert ended["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2, RESTART, 134, 143],
    }
    assert gone["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    impossible, preempted = manifest["spec"]["failurePolicy"]["rules"]
    assert (impossible["action"], impossible["onJobFailureMessagePatterns"]) == ("FailJobSet", ["exit code 2 "])
    assert preempted["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert pod["terminationGracePeriodSeconds"] > 120  # longer than a save
