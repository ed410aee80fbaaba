"""Starts a command on Kubernetes as a JobSet: one pod a host, all restarted when one is lost.

Examples:
  python -m launch.jobset --name=v2 --image=REGISTRY/medsam_jax --pods=2 --devices_per_pod=8 \\
      --claim=shared --config=configs/medsam_v2.py --workdir=/mnt/shared/v2 \\
      --data_dir=/mnt/shared/data --set=eval_batch_size=16 --dry_run > v2.yaml
  python -m launch.jobset --name=v2 --image=REGISTRY/medsam_jax --pods=4 --devices_per_pod=4 \\
      --accelerator=google.com/tpu --tpu_accelerator=tpu-v5-lite-podslice --tpu_topology=4x4 \\
      --claim=shared --config=configs/medsam_v2.py --workdir=/mnt/shared/v2 \\
      --data_dir=/mnt/shared/data --set=eval_batch_size=16 --dry_run
  python -m launch.jobset --name=masks --image=REGISTRY/medsam_jax --pods=4 --claim=shared \\
      --command=predict --dry_run -- --checkpoint=lite_medsam --image=/mnt/shared/scans \\
      --prompts=/mnt/shared/prompts.json --output=/mnt/shared/masks

The cluster needs the JobSet controller, 0.6 or later. The image is that of the `Containerfile`:
the repository in its working directory, and jax for the accelerator. On GKE the pods of a TPU slice
go to the node pool of --tpu_accelerator and --tpu_topology. `build` is one pod without
accelerators. The volume claim is mounted in every pod. An evicted pod gets SIGTERM and has
--grace_seconds to save its state. The JobSet then restarts all pods, and the run resumes from its
last checkpoint; after an error (status 1) it does not.
"""

import math
import re
import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch import common
from medsam_jax import cli, errors

PORT = 8476  # on which process 0 accepts the others
TPU = "google.com/tpu"
ACCELERATORS = ("nvidia.com/gpu", TPU)
# A command that ends with an error of its own, status 1, would do so again.
_ERROR = {"operator": "In", "values": [1]}
_NO_RESTART = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
_ONE_POOL = "alpha.jobset.sigs.k8s.io/exclusive-topology"

_NAME = flags.DEFINE_string("name", None, "Of the JobSet.")
_NAMESPACE = flags.DEFINE_string("namespace", "default", "Of Kubernetes.")
_IMAGE = flags.DEFINE_string("image", None, "Container image.")
_PODS = flags.DEFINE_integer("pods", 1, "How many.")
_DEVICES = flags.DEFINE_integer("devices_per_pod", 1, "Accelerators of each.")
_ACCELERATOR = flags.DEFINE_enum("accelerator", ACCELERATORS[0], ACCELERATORS, "Their resource.")
_TPU_ACCELERATOR = flags.DEFINE_string(
    "tpu_accelerator", None, "GKE's name of the TPU, such as tpu-v5-lite-podslice."
)
_TPU_TOPOLOGY = flags.DEFINE_string("tpu_topology", None, "Of the slice, such as 4x4 or 2x2x2.")
_SELECTOR = flags.DEFINE_multi_string("node_selector", [], "KEY=VALUE of nodes; repeatable.")
_CLAIM = flags.DEFINE_string("claim", None, "Persistent volume claim with data and workdir.")
_MOUNT = flags.DEFINE_string("mount", "/mnt/shared", "Where pods see it.")
_RESTARTS = flags.DEFINE_integer("max_restarts", 100, "Before the JobSet gives up.")
_GRACE = flags.DEFINE_integer("grace_seconds", 180, "From SIGTERM to the kill.")


def main(argv: Sequence[str]) -> None:
    common.check_positive("pods", "devices_per_pod", "max_restarts", "grace_seconds")
    common.check_one_process("pods")
    # The longest host name that contains it must fit in a DNS label.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,39}[a-z0-9])?", _NAME.value):
        raise errors.UserError(
            f"--name: {_NAME.value!r} given; use up to 41 lower-case letters, digits and dashes"
        )
    import yaml

    text = yaml.safe_dump(job_set(argv[1:]), sort_keys=False, width=1000)
    common.submit(["kubectl", "apply", f"--namespace={_NAMESPACE.value}", "-f", "-"], text)


def job_set(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the JobSet manifest."""
    name = common.command_name()
    container = {
        "name": name,
        "image": _IMAGE.value,
        # exec: the process must receive the pod's SIGTERM.
        "command": ["bash", "-c", f"exec {_command(arguments)}"],
        "ports": [{"containerPort": PORT}],
        "volumeMounts": [{"name": "shared", "mountPath": _MOUNT.value}],
    }
    if name != "build":
        container["resources"] = {"limits": {_ACCELERATOR.value: _DEVICES.value}}
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE.value,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": _CLAIM.value}},
        ],
    }
    slice_selector = _tpu_slice()
    if selector := slice_selector | dict(_pair(text) for text in _SELECTOR.value):
        pod["nodeSelector"] = selector
    job = {
        "completionMode": "Indexed",
        "parallelism": _PODS.value,
        "completions": _PODS.value,
        "backoffLimit": 0,  # one lost pod stops all, and the JobSet restarts all
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": _ERROR | {"containerName": name}}]
        },
        "template": {"spec": pod},
    }
    metadata: dict[str, Any] = {"name": _NAME.value}
    if slice_selector:  # the pods of a job share one node pool, which is one slice
        metadata["annotations"] = {_ONE_POOL: "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": _RESTARTS.value, "rules": [_NO_RESTART]},
            "replicatedJobs": [{"name": "hosts", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _tpu_slice() -> dict[str, str]:
    """Returns GKE's node selector of a TPU slice. Raises UserError if the pods do not fill it."""
    kind, topology = _TPU_ACCELERATOR.value, _TPU_TOPOLOGY.value
    if kind is None and topology is None:
        return {}
    if not (kind and topology) or _ACCELERATOR.value != TPU:
        raise errors.UserError(
            f"--tpu_accelerator, --tpu_topology: {kind}, {topology} given; give both, with "
            f"--accelerator={TPU}"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise errors.UserError(
            f"--tpu_topology: {topology!r} given; use a form such as 4x4 or 2x2x2"
        )
    chips, asked = math.prod(map(int, topology.split("x"))), _PODS.value * _DEVICES.value
    if chips != asked:
        raise errors.UserError(
            f"--tpu_topology: {topology} has {chips} chips, --pods x --devices_per_pod is {asked}"
        )
    prefix = "cloud.google.com/gke-tpu-"
    return {f"{prefix}accelerator": kind, f"{prefix}topology": topology}


def _command(arguments: Sequence[str]) -> str:
    """Command of a pod. GPU pods need JobSet's host names; TPU pods read GKE's variables."""
    devices = _PODS.value * _DEVICES.value
    if _PODS.value == 1:
        return shlex.join(common.command(arguments, devices))
    if _ACCELERATOR.value == TPU:
        return shlex.join(common.command(arguments, devices, ["--multihost"]))
    coordinator = f"{_NAME.value}-hosts-0-0.{_NAME.value}:{PORT}"
    place = [f"--coordinator={coordinator}", f"--num_processes={_PODS.value}"]
    return shlex.join(common.command(arguments, devices, place)) + (
        ' --process_id="$JOB_COMPLETION_INDEX"'
    )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise errors.UserError(f"--node_selector: {text!r} given; use KEY=VALUE")
    return key, value


if __name__ == "__main__":
    flags.mark_flags_as_required(["name", "image", "claim"])
    cli.run(main, positional=common.ARGUMENTS)
