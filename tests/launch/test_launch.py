"""Launchers say what they would submit; it is valid, and bad arguments are refused before."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMMON = ["--config=configs/demo.py", "--workdir=/shared/run 1", "--data_dir=/shared/data"]
TRAIN = "python -m medsam_jax.train --config configs/demo.py --workdir '/shared/run 1'"
JOBSET = ["--name=run", "--image=registry/image", "--claim=disk"]
TPU = ["--tpu=slice", "--zone=us-west4-a", "--chips=4"]


def launch(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"launch.{name}", *COMMON, "--dry_run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def dry_run(name: str, *arguments: str) -> tuple[str, str]:
    """The command and its input."""
    run = launch(name, *arguments)
    assert run.returncode == 0, run.stderr
    first, _, text = run.stdout.partition("\n")
    return first.removeprefix("# would run: ").removesuffix(", with this input:"), text


def slurm_options(text: str) -> dict[str, str]:
    lines = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    return dict(line.removeprefix("--").partition("=")[::2] for line in lines)


@pytest.fixture
def fake_slurm(tmp_path):
    """srun that ends as $STATUS says; what it and scontrol were asked is in `calls`."""
    for name, status in (("srun", '"$STATUS"'), ("scontrol", "0")):
        script = tmp_path / name
        script.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\nexit {status}\n')
        script.chmod(0o755)

    def run(text: str, status: int, restarts: int = 0) -> tuple[int, list[str]]:
        (tmp_path / "calls").write_text("")
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
        env |= {"STATUS": str(status), "SLURM_RESTART_COUNT": str(restarts)}
        ended = subprocess.run(["bash", "-c", text], env=env, capture_output=True).returncode
        return ended, (tmp_path / "calls").read_text().splitlines()

    return run


def test_a_config_is_checked_by_its_name():
    _, text = dry_run("slurm", "--config=demo", "--set=num_steps=1")
    assert "medsam_jax.train --config demo --workdir" in text
    wrong = launch("slurm", "--config=demo", "--set=steps=1")
    assert wrong.stderr == "error: --set: 'steps=1' names no field of demo; give NAME=VALUE\n"


def test_one_slurm_node(fake_slurm):
    command, text = dry_run("slurm", "--gpus_per_node=4", "--set=learning_rate=1e-4")
    assert command == "sbatch"
    options = slurm_options(text)
    assert options["nodes"] == options["ntasks-per-node"] == "1"
    assert (options["gpus-per-node"], options["cpus-per-task"]) == ("4", "32")
    assert options["signal"] == "TERM@180"
    assert "requeue" in options
    assert "--multihost" not in text
    assert f"{TRAIN} --config.data_dir=/shared/data --config.learning_rate=1e-4\n" in text

    status, calls = fake_slurm(text, 143)
    assert status == 143
    assert calls[0].startswith("srun --kill-on-bad-exit=1 python -m medsam_jax.train")
    assert calls[1:] == ["scontrol requeue 17"]
    for status in (0, 1):
        assert fake_slurm(text, status) == (status, calls[:1])
    assert fake_slurm(text, 143, restarts=100) == (143, calls[:1]), "no more than --max_restarts"


def test_many_slurm_nodes():
    _, text = dry_run(
        "slurm", "--nodes=2", "--gpus_per_node=4", "--option=--partition=gpu", "--notice_seconds=60"
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    options = slurm_options(text)
    assert (options["nodes"], options["ntasks-per-node"]) == ("2", "4")
    assert (options["partition"], options["signal"]) == ("gpu", "TERM@60")
    assert text.count(" --multihost\n") == 1


def test_tpu_slice():
    command, text = dry_run("tpu_vm", *TPU, "--directory=a b")
    words = shlex.split(command)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert words[6:8] == ["--zone=us-west4-a", "--worker=all"]
    remote = words[8].removeprefix("--command=")
    assert remote.startswith(f"cd 'a b' && exec {TRAIN}")
    assert remote.endswith(" --multihost")
    assert text == ""
    assert subprocess.run(["bash", "-n"], input=remote, text=True).returncode == 0


@pytest.mark.parametrize("name", ["slurm", "tpu_vm", "jobset", "local"])
def test_the_examples_of_the_help_are_right(name):
    source = (ROOT / "launch" / f"{name}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source), clean=False).replace("\\\n", "")
    examples = re.findall(r"^  python -m (.*?)(?: > .*)?$", text, re.MULTILINE)
    assert len(examples) == text.count("python -m")
    for example in examples:
        assert "--dry_run" in example
        run = subprocess.run(
            [sys.executable, "-m", *shlex.split(example)], cwd=ROOT, capture_output=True, text=True
        )
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout.startswith("# would run")


def test_jobset_of_gpus():
    command, text = dry_run(
        "jobset", *JOBSET, "--pods=2", "--devices_per_pod=4", "--node_selector=pool=a100"
    )
    assert command == "kubectl apply --namespace=default -f -"
    whole = yaml.safe_load(text)
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = whole["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (2, 2, "Indexed")
    assert whole["spec"]["failurePolicy"]["maxRestarts"] == 100
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"operator": "In", "values": [1], "containerName": "train"}
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "a100"}
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}}
    shell, flag, script = container["command"]
    assert (shell, flag) == ("bash", "-c")
    assert script.startswith(f"exec {TRAIN}")
    port = container["ports"][0]["containerPort"]
    assert f"--coordinator=run-hosts-0-0.run:{port} --num_processes=2" in script
    echoed = subprocess.run(
        ["bash", "-c", script.replace("exec python", "printf '%s\\n'", 1)],
        env={"JOB_COMPLETION_INDEX": "1"},
        capture_output=True,
        text=True,
    )
    assert echoed.stdout.splitlines()[-1] == "--process_id=1"
    assert "/shared/run 1" in echoed.stdout.splitlines()


def start(name: str, *arguments: str) -> str:
    """Returns what a launcher prints, without the flags of training."""
    command = [sys.executable, "-m", f"launch.{name}", "--dry_run", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


PREDICT = ["--command=predict", "--", "--checkpoint=m", "--image=a b", "--output=o", "--auto"]
BUILD = ["--command=build", "--", "--manifest=cases.csv", "--data_dir=d", "--beam_runner=Flink"]


def test_every_command_on_a_cluster():
    masks = "python -m medsam_jax.predict --checkpoint=m '--image=a b' --output=o --auto"
    assert f"--kill-on-bad-exit=1 {masks} --multihost\n" in start("slurm", "--nodes=2", *PREDICT)
    text = start("slurm", "--gpus_per_node=4", *BUILD)
    built = "python -m datasets.build --manifest=cases.csv --data_dir=d --beam_runner=Flink"
    assert f"--kill-on-bad-exit=1 {built}\n" in text
    assert slurm_options(text).get("gpus-per-node") is None
    assert slurm_options(text)["cpus-per-task"] == "32"
    text = start("tpu_vm", *TPU, *BUILD)
    assert "--worker=0 " in text
    assert f"exec {built}'" in text
    embed = ["--command=embed", *COMMON[::2], "--set=embedding_cache=/shared/cache"]
    cached = "--embed_only --config.data_dir=/shared/data --config.embedding_cache=/shared/cache"
    text = start("tpu_vm", *TPU, *embed)
    assert f"medsam_jax.train --config configs/demo.py {cached} --multihost'" in text
    scores = ["--command=evaluate", "--", "--checkpoint=m", "--data_dir=d", "--output=o"]
    text = start("jobset", *JOBSET, "--pods=2", *scores)
    assert "medsam_jax.evaluate --checkpoint=m --data_dir=d --output=o --coordinator=" in text


def test_jobset_of_a_tpu_slice():
    tpu = ["--accelerator=google.com/tpu", "--tpu_accelerator=tpu-v5p-slice", "--pods=2"]
    text = start("jobset", *JOBSET, *tpu, "--tpu_topology=2x2x2", "--devices_per_pod=4", *PREDICT)
    whole = yaml.safe_load(text.partition("\n")[2])
    pools = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert whole["metadata"] == {"name": "run", "annotations": pools}
    pod = whole["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x2",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["command"][2].endswith(" --auto --multihost")


SLICE = ["--accelerator=google.com/tpu", "--tpu_accelerator=tpu-v5p-slice"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("slurm", ["--nodes=2", *BUILD], "--nodes: 2 given; build is one process"),
        ("slurm", PREDICT[:3], "predict: --image, --output missing"),
        ("slurm", ["--config=configs/demo.py", *PREDICT], "--config: for train and embed; give"),
        ("slurm", [*COMMON, "--", "--prompt=box"], "unexpected argument '--prompt=box'"),
        ("jobset", [*JOBSET, *SLICE, *PREDICT], "--tpu_topology: tpu-v5p-slice, None given"),
        (
            "jobset",
            [*JOBSET, *SLICE, "--tpu_topology=2x2x2", *PREDICT],
            "--tpu_topology: 2x2x2 has 8 chips, --pods x --devices_per_pod is 1",
        ),
        ("jobset", [*JOBSET, *SLICE, "--tpu_topology=4", *PREDICT], "--tpu_topology: '4' given"),
    ],
)
def test_other_commands_are_checked_before(name, arguments, message):
    command = [sys.executable, "-m", f"launch.{name}", "--dry_run", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert message in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("slurm", ["--config=configs/none.py"], "--config: configs/none.py is not a file"),
        ("slurm", ["--set=learning_rat=1"], "--set: 'learning_rat=1' names no field"),
        ("slurm", ["--nodes=3"], "config.batch_size / accumulation_steps: 8 is not a multiple"),
        ("slurm", ["--gpus_per_node=0"], "--gpus_per_node: 0 given"),
        ("tpu_vm", TPU[:2], "--chips"),
        ("jobset", [*JOBSET, "--name=Run_1"], "--name: 'Run_1' given"),
    ],
)
def test_bad_arguments_are_refused(name, arguments, message):
    run = launch(name, *arguments)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
