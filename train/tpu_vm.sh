#!/bin/bash
# Installs jaxgen on every host of a TPU VM, starts training there, and shows the first host's log:
#     train/tpu_vm.sh NAME ZONE configs/sd15.py --data.source /data/photos --out /data/runs/sd15
# Ctrl-C ends the showing alone; training is a service of the hosts and goes on. To stop it, saved:
#     gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker all --command "sudo systemctl stop jaxgen"
# So it is when a spot VM is taken away; the same command goes on from there.
#
# Data and runs are at one path on every host. Data may be a bucket (gcsfuse); --out must be on
# Filestore or in a bucket with a hierarchical namespace: a checkpoint counts once its folder is
# renamed, which in other buckets is many renames, and a run killed amid them leaves half of one.
set -euo pipefail
name=$1 zone=$2
shift 2

on() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker "$1" --command "$2"
}

on all "mkdir -p jaxgen"
gcloud compute tpus tpu-vm scp --recurse --zone "$zone" --worker all \
  pyproject.toml README.md LICENSE jaxgen configs train "$name:jaxgen/"

# Images of TPU VMs bring Python 3.10; uv fetches the one that is asked for.
on all "cd jaxgen && (command -v ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh) &&
  ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv &&
  ~/.local/bin/uv pip install --quiet --python .venv -e '.[tpu,train]'"

# On SIGTERM the run saves; readers of data, which are killed in the end, are not to end before it.
on all "sudo systemd-run --unit jaxgen --collect --uid \$(id -u) --working-directory ~/jaxgen \
  --property KillMode=mixed --property TimeoutStopSec=300 \
  --property StandardOutput=append:\$HOME/jaxgen/train.log \
  --property StandardError=append:\$HOME/jaxgen/train.log \
  ~/jaxgen/.venv/bin/python train/main.py $(printf '%q ' "$@")"
on 0 "tail -n +1 -F jaxgen/train.log"
