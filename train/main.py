"""What every process of a pod, a cluster or a laptop runs: start together, then the library.

    python train/main.py configs/sd15.py --data.source /mnt/photos [--field value ...]

Every process finds the data at the same path, on a disk that all share or in a bucket that each has
mounted (Cloud Storage by gcsfuse). The run's folder (out) is shared likewise, on a disk that
renames a folder in one go: Filestore, Lustre and NFS do, and of buckets only those with a
hierarchical namespace.

On TPU VMs and GKE, under Slurm and Open MPI, and in an indexed Job of Kubernetes the processes find
each other. Elsewhere, or where that is not wanted, each is told by the environment:
JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Where jax
finds no others and none are told, it trains alone.

The only process of a node takes all of its GPUs; several take one each, by their number there.
JAX_LOCAL_DEVICE_IDS (0,1,2,3) says otherwise.
"""

import os
import sys

import jax

from jaxgen.types import UserError

TOLD = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
    """Joins the other processes, where there are any; must come before jax looks for devices.

    Raises:
        UserError: for variables that do not say who the others are, and in a Job of Kubernetes
            whose pods cannot find each other.
    """
    if any(name in os.environ for name in TOLD):
        address, count, process = told()
        # Nobody else is asked: a pod or a TPU VM may well be of another cluster than it is told.
        jax.distributed.initialize(address, count, process, cluster_detection_method="deactivate")
        return
    if "JOB_COMPLETION_INDEX" not in os.environ:
        # Every pod has this variable, and jax asks for its Job then; only an indexed one tells.
        os.environ.pop("KUBERNETES_SERVICE_HOST", None)
    # jax gives each process of Slurm and Open MPI one device, by its number; none listed, all seen.
    mine: list[int] | None = (
        [] if only_of_node() and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None
    )
    try:
        jax.distributed.initialize(local_device_ids=mine)
    except ValueError as error:
        if "coordinator_address" not in str(error):  # jax knows no cluster of this kind
            raise
        if "JOB_COMPLETION_INDEX" in os.environ:
            raise UserError(
                "this is a pod of an indexed Job, and finds the others by the package kubernetes: "
                "pip install 'jaxgen[k8s]'. To train alone in it, set "
                "JAX_COORDINATOR_ADDRESS=localhost:1234 JAX_NUM_PROCESSES=1 JAX_PROCESS_ID=0"
            ) from None


def told() -> tuple[str, int, int]:
    """Address of the first process, how many there are, and which is this: by the environment."""
    values = [os.environ.get(name, "") for name in TOLD]
    address, count, process = values
    host, _, port = address.rpartition(":")
    numbers = all(value.isdecimal() for value in (port, count, process))
    if not (host and numbers and int(process) < int(count)):
        given = " ".join(f"{name}={value}" for name, value in zip(TOLD, values))
        raise UserError(
            f"{given}: these are host:port of the first process, the number of processes, and the "
            "number of this one, from 0; all three or none"
        )
    return address, int(count), int(process)


def only_of_node() -> bool:
    """Whether Open MPI or Slurm, asked in jax's order, started one process on each node."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    nodes = os.environ.get("SLURM_STEP_NUM_NODES")
    return nodes is not None and nodes == os.environ.get("SLURM_NTASKS")


if __name__ == "__main__":
    try:
        start()
    except UserError as error:
        print(f"jaxgen: {error}", file=sys.stderr)
        sys.exit(2)
    from jaxgen.cli import main

    main(["train", *sys.argv[1:]])
