"""What every process of a pod, a cluster or a laptop runs: start together, then the library.

    python train/main.py configs/sd15.py --data.source gs://bucket/photos [--field value ...]

On TPU pods, under Slurm, on GKE and under Open MPI the processes find each other. Elsewhere each is
told by the environment: JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and
JAX_PROCESS_ID. With none of these it trains alone.
"""

import os
import sys


def start() -> None:
    """Joins the other processes, where there are any."""
    import jax

    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    elif any(name in os.environ for name in CLUSTERS):
        jax.distributed.initialize()


# Variables by which jax knows a cluster; without one of them it would complain of being alone.
CLUSTERS = (
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "SLURM_STEP_NODELIST",
    "OMPI_MCA_orte_hnp_uri",
    "KUBERNETES_SERVICE_HOST",
)


if __name__ == "__main__":
    start()
    from jaxgen.cli import main

    main(["train", *sys.argv[1:]])
