"""How the processes of a cluster find each other, and the scripts that start them."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import yaml
from jax._src.clusters import K8sCluster

from jaxgen.training import signals
from jaxgen.types import UserError
from train import main

ROOT = Path(__file__).parents[2]
FOUND = re.compile("^(JAX_(COORDINATOR|NUM_PROC|PROCESS_ID|LOCAL)|TPU|SLURM|OMPI|KUBE|JOB_|MEGA)")
JOB = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "1",
}


@pytest.fixture
def alone(monkeypatch):
    """An environment without any cluster; what jax is asked, which knows none either."""
    asked = []

    def initialize(*positional, **named):
        asked.append((positional, named))
        if not positional:
            raise ValueError("coordinator_address should be defined.")

    for name in filter(FOUND.match, [*os.environ]):
        monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return asked


def run(code, **variables):
    """A process that jax has not seen yet, with these variables of a cluster; what it says."""
    clean = {name: value for name, value in os.environ.items() if not FOUND.match(name)}
    environment = clean | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(
        [sys.executable, *code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_jax_itself_finds_nobody_on_a_laptop_or_in_a_lone_pod():
    code = """
import os, jax
from train import main
main.start()
os.environ["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
main.start()
print(jax.distributed.is_initialized(), jax.process_count())
"""
    assert run(["-c", code]) == (0, "False 1\n")


class Metadata(BaseHTTPRequestHandler):
    """What Google's server of metadata tells the hosts of a TPU VM of two; /1/... is the second."""

    def do_GET(self):
        told = {
            "agent-worker-number": self.path[1],
            "worker-network-endpoints": "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.2",
            "tpu-env": "ACCELERATOR_TYPE: 'v4-16'",
        }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(told[self.path.rpartition("/")[2]].encode())

    def log_message(self, *_):
        pass


def test_the_hosts_of_a_tpu_vm_find_each_other_by_metadata():
    code = """
import os, jax
os.environ.pop("TPU_SKIP_MDS_QUERY")  # which jax sets where it sees no chips
from train import main
main.start()
print(jax.process_index(), jax.process_count())
"""
    with HTTPServer(("localhost", 0), Metadata) as server, ThreadPool(2) as pool:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"localhost:{server.server_port}"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        said = pool.map(
            lambda host: run(
                ["-c", code],
                GCE_METADATA_IP=f"{address}/{host}",
                JAX_FORCE_TPU_INIT="1",
                JAX_COORDINATOR_PORT=port,
            ),
            range(2),
        )
        server.shutdown()
    assert [(code, text.splitlines()[-1]) for code, text in said] == [(0, "0 2"), (0, "1 2")]


@pytest.mark.parametrize(
    ("variables", "visible"),
    [({}, "all"), ({"JAX_LOCAL_DEVICE_IDS": "2,3"}, "2,3"), ({"SLURM_NTASKS": "2"}, "0")],
    ids=["one for the node", "told", "one of two"],
)
def test_the_only_process_of_a_node_takes_all_its_gpus(variables, visible):
    # Where the other one of two is not there, jax is stopped once it has chosen the devices.
    code = """
import jax
from jax._src import xla_bridge
from jax._src.lib import _jax
from train import main
if {alone}:
    main.start()
    assert jax.process_count() == 1 and jax.distributed.is_initialized()
else:
    _jax.get_distributed_runtime_service = None
    try:
        main.start()
    except TypeError:
        pass
print(xla_bridge.CUDA_VISIBLE_DEVICES.value)
""".replace("{alone}", str("SLURM_NTASKS" not in variables))
    assert run(["-c", code], **SLURM | variables) == (0, f"{visible}\n")


@pytest.mark.parametrize(
    ("variables", "only"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),  # a shell within an allocation: no step
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "4"}, True),
        ({"SLURM_NTASKS": "32", "SLURM_STEP_NUM_NODES": "4"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        (SLURM | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
    ],
)
def test_one_process_of_each_node_is_known(alone, monkeypatch, variables, only):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    main.start()
    assert alone == [((), {"local_device_ids": [] if only else None})]


def test_what_is_told_is_asked_of_nobody(alone, monkeypatch):
    told = dict(zip(main.TOLD, ("[::1]:1234", "4", "3")))
    for name, value in (told | JOB).items():
        monkeypatch.setenv(name, value)
    main.start()
    assert alone == [(("[::1]:1234", 4, 3), {"cluster_detection_method": "deactivate"})]


@pytest.mark.parametrize(
    "values",
    [
        ("h:1", "4", None),
        ("h:1", "4", "4"),
        ("h", "4", "0"),
        ("h:1", "four", "0"),
        (None, "1", "0"),
    ],
)
def test_half_of_what_must_be_told_is_refused(alone, monkeypatch, values):
    for name, value in zip(main.TOLD, values):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="all three or none"):
        main.start()
    assert not alone


def test_a_pod_of_a_job_does_not_train_alone_in_silence():
    if importlib.util.find_spec("kubernetes"):
        pytest.skip("kubernetes is installed")
    code, said = run(["train/main.py", "configs/mini.py"], **JOB)
    assert code == 2
    assert said.splitlines()[-1].startswith("jaxgen: this is a pod of an indexed Job")


def test_what_a_cluster_says_wrong_is_not_taken_for_solitude(alone, monkeypatch):
    def initialize(**named):
        raise ValueError("unsupported worker-network-endpoints format")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="endpoints"):
        main.start()


def script(folder, program):
    """Puts a program that writes its arguments, one a line, before the others."""
    file = folder / program
    file.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" "" >> {folder}/{program}.said\n')
    file.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_slurm_starts_the_program_with_its_options(tmp_path):
    environment = script(tmp_path, "srun") | {"SLURM_CPUS_PER_TASK": "32"}
    subprocess.run(["train/slurm.sh", "a b.py", "--x"], cwd=ROOT, env=environment, check=True)
    options = ["--kill-on-bad-exit=1", "--cpus-per-task=32"]  # srun takes the first with = alone
    wanted = [*options, ".venv/bin/python", "train/main.py", "a b.py", "--x"]
    assert (tmp_path / "srun.said").read_text().split("\n")[: len(wanted)] == wanted


def test_tpu_vm_hands_on_what_it_is_given(tmp_path):
    environment = script(tmp_path, "gcloud")
    script(tmp_path, "sudo")
    given = ["name", "zone", "a b.py", "--samples.prompts", 'an owl\'s "nest" $HOME']
    subprocess.run(["train/tpu_vm.sh", *given], cwd=ROOT, env=environment, check=True)
    said = (tmp_path / "gcloud.said").read_text()
    commands = [call.partition("--command\n")[2] for call in re.split("\n\n", said)]
    commands = [command for command in commands if command]
    assert commands[0] == "mkdir -p jaxgen"
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    service = next(command for command in commands if "systemd-run" in command)
    subprocess.run(["bash", "-c", service], env=environment, check=True)
    assert (tmp_path / "sudo.said").read_text().split("\n")[-len(given) :][:3] == given[2:]


@pytest.fixture
def hangup():
    """SIGHUP as a terminal has it, whatever these tests run under."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield signal.SIG_DFL
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_ends_lets_the_run_save(hangup):
    with signals.caught() as stopped:
        assert not stopped.is_set()
        signal.raise_signal(signal.SIGHUP)
        assert stopped.is_set()
    assert signal.getsignal(signal.SIGHUP) == hangup


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.caught() as stopped:
            signal.raise_signal(signal.SIGHUP)
            assert not stopped.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def objects(value):
    """Of a manifest, what the client of Kubernetes returns: attributes, but labels by name."""
    if isinstance(value, list):
        return [objects(item) for item in value]
    if not isinstance(value, dict):
        return value
    names = {re.sub("([A-Z]+)", lambda m: f"_{m[0].lower()}", name): name for name in value}
    plain = ("labels", "selector")
    return SimpleNamespace(
        **{to: value[of] if of in plain else objects(value[of]) for to, of in names.items()}
    )


def test_jax_finds_the_pods_of_the_manifest_by_what_its_role_allows(monkeypatch):
    manifest = {
        document["kind"]: document
        for document in yaml.safe_load_all((ROOT / "train" / "kubernetes.yaml").read_text())
    }
    job, role, name = (
        objects(manifest["Job"]),
        manifest["Role"],
        manifest["Job"]["metadata"]["name"],
    )
    template = job.spec.template.spec
    owner = SimpleNamespace(controller=True, kind="Job")
    metadata = SimpleNamespace(name="pod", labels={"job-name": name}, owner_references=[owner])
    pod = SimpleNamespace(metadata=metadata, spec=template)
    asked = set()

    def answer(what, value):
        return lambda *_, **__: asked.add(what) or value

    pods = SimpleNamespace(list_namespaced_pod=answer("pods", SimpleNamespace(items=[pod])))
    jobs = SimpleNamespace(read_namespaced_job=answer("jobs", job))
    client = SimpleNamespace(
        CoreV1Api=lambda: pods,
        BatchV1Api=lambda: jobs,
        exceptions=SimpleNamespace(ApiException=OSError),
    )
    config = SimpleNamespace(load_incluster_config=lambda: None)
    monkeypatch.setitem(sys.modules, "kubernetes", SimpleNamespace(client=client, config=config))
    monkeypatch.setattr(K8sCluster, "_namespace", lambda: "default")
    for key, value in (JOB | {"HOSTNAME": "localhost"}).items():
        monkeypatch.setenv(key, value)

    assert K8sCluster.is_env_present()
    address = K8sCluster.get_coordinator_address(None, None)
    service = manifest["Service"]
    assert re.fullmatch(rf"{name}-0\.{service['metadata']['name']}:\d+", address)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert K8sCluster.get_process_count() == job.spec.completions == 4
    assert K8sCluster.get_process_id() == 1
    assert job.spec.completion_mode == "Indexed"

    allowed = {what for rule in role["rules"] for what in rule["resources"] if rule["verbs"]}
    assert asked == {"pods", "jobs"} <= allowed
    bound = manifest["RoleBinding"]
    assert bound["roleRef"]["name"] == role["metadata"]["name"]
    account = manifest["ServiceAccount"]["metadata"]["name"]
    assert bound["subjects"][0]["name"] == template.service_account_name == account
