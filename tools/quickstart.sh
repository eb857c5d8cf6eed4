#!/usr/bin/env bash
# Installs dr_jax into .venv and runs the main job on the embedded web: no accelerator, no key, no account.
# The same command again goes on where it stopped, or says that it is finished. Arguments are passed on, e.g.
#   bash tools/quickstart.sh --workdir=runs/seed1 --config.seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh

install -e .
mkdir -p runs
export JAX_PLATFORMS=cpu
exec .venv/bin/python -m dr_jax.train --config=configs/quickstart.py --workdir=runs/quickstart "$@"
