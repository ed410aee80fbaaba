"""Trains on Kubernetes as a JobSet: one pod per host, restarted together after a preemption.

Example:
  python -m launch.jobset --name=v2 --image=REGISTRY/medsam_jax --pods=2 --devices_per_pod=8 \\
      --claim=shared --config=configs/medsam_v2.py --workdir=/mnt/shared/v2 \\
      --data_dir=/mnt/shared/data --set=eval_batch_size=16 --dry_run > v2.yaml

The cluster needs the JobSet controller. The image has the repository in its working directory and
jax for the accelerator. The volume claim is mounted in every pod. An evicted pod gets SIGTERM and
has --grace_seconds to save its state. The JobSet then restarts all pods, and the run resumes from
its last checkpoint.
"""

import re
import shlex
from typing import Any

from absl import flags

from launch import common
from medsam_jax import cli, errors

PORT = 8476  # on which process 0 accepts the others
ACCELERATORS = ("nvidia.com/gpu", "google.com/tpu")

_NAME = flags.DEFINE_string("name", None, "Of the JobSet.")
_NAMESPACE = flags.DEFINE_string("namespace", "default", "Of Kubernetes.")
_IMAGE = flags.DEFINE_string("image", None, "Container image.")
_PODS = flags.DEFINE_integer("pods", 1, "How many.")
_DEVICES = flags.DEFINE_integer("devices_per_pod", 1, "Accelerators of each.")
_ACCELERATOR = flags.DEFINE_enum("accelerator", ACCELERATORS[0], ACCELERATORS, "Their resource.")
_SELECTOR = flags.DEFINE_multi_string("node_selector", [], "KEY=VALUE of nodes; repeatable.")
_CLAIM = flags.DEFINE_string("claim", None, "Persistent volume claim with data and workdir.")
_MOUNT = flags.DEFINE_string("mount", "/mnt/shared", "Where pods see it.")
_RESTARTS = flags.DEFINE_integer("max_restarts", 100, "Before the JobSet gives up.")
_GRACE = flags.DEFINE_integer("grace_seconds", 180, "From SIGTERM to the kill.")


def main(_) -> None:
    common.check_positive("pods", "devices_per_pod", "max_restarts", "grace_seconds")
    # The longest host name that contains it must fit in a DNS label.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,39}[a-z0-9])?", _NAME.value):
        raise errors.UserError(
            f"--name: {_NAME.value!r} given; use up to 41 lower-case letters, digits and dashes"
        )
    import yaml

    text = yaml.safe_dump(job_set(), sort_keys=False, width=1000)
    common.submit(["kubectl", "apply", f"--namespace={_NAMESPACE.value}", "-f", "-"], text)


def job_set() -> dict[str, Any]:
    """Returns the JobSet manifest."""
    container = {
        "name": "train",
        "image": _IMAGE.value,
        # exec: the training process must receive the pod's SIGTERM.
        "command": ["bash", "-c", f"exec {_training_command()}"],
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": {_ACCELERATOR.value: _DEVICES.value}},
        "volumeMounts": [{"name": "shared", "mountPath": _MOUNT.value}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE.value,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": _CLAIM.value}},
        ],
    }
    if _SELECTOR.value:
        pod["nodeSelector"] = dict(_pair(text) for text in _SELECTOR.value)
    job = {
        "completionMode": "Indexed",
        "parallelism": _PODS.value,
        "completions": _PODS.value,
        "backoffLimit": 0,  # one lost pod stops all, and the JobSet restarts all
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": _NAME.value},
        "spec": {
            "failurePolicy": {"maxRestarts": _RESTARTS.value},
            "replicatedJobs": [{"name": "hosts", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _training_command() -> str:
    """Training command. GPU pods need JobSet's host names; TPU pods read GKE's variables."""
    devices = _PODS.value * _DEVICES.value
    if _PODS.value == 1:
        return shlex.join(common.training_command(devices, []))
    if _ACCELERATOR.value == "google.com/tpu":
        return shlex.join(common.training_command(devices, ["--multihost"]))
    coordinator = f"{_NAME.value}-hosts-0-0.{_NAME.value}:{PORT}"
    place = [f"--coordinator={coordinator}", f"--num_processes={_PODS.value}"]
    return shlex.join(common.training_command(devices, place)) + (
        ' --process_id="$JOB_COMPLETION_INDEX"'
    )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise errors.UserError(f"--node_selector: {text!r} given; use KEY=VALUE")
    return key, value


if __name__ == "__main__":
    flags.mark_flags_as_required([*common.REQUIRED, "name", "image", "claim"])
    cli.run(main)
