#!/bin/bash
# Installs jaxgen on every host of a TPU VM, and trains:
#     train/tpu_vm.sh NAME ZONE configs/sd15.py --data.source /data/photos --out /data/runs/sd15
# Data and runs must be on a disk that all hosts mount (Filestore, gcsfuse). When a spot VM is taken
# away, SIGTERM saves; the same command goes on from there.
set -euo pipefail
name=$1 zone=$2
shift 2

everywhere() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"
}

gcloud compute tpus tpu-vm scp --recurse --zone "$zone" --worker all \
  pyproject.toml README.md LICENSE jaxgen configs train "$name:jaxgen/"
everywhere "cd jaxgen && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,train]'"
everywhere "cd jaxgen && .venv/bin/python train/main.py $(printf '%q ' "$@")"
