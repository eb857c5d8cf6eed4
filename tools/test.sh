#!/usr/bin/env bash
# Installs what the tests need into .venv, then checks style and runs them. Arguments go to pytest:
#   bash tools/test.sh tests/web -k redirect
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh

install -e '.[test]'
.venv/bin/ruff format --check .
.venv/bin/ruff check .
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest -m "not slow" "$@"
