# Sourced by quickstart.sh and test.sh: makes .venv with the newest Python there is, and defines `install`.

python="${PYTHON:-}"
if [ -z "$python" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
fi
if [ -z "$python" ]; then
  echo "error: dr_jax needs Python 3.11 or newer; install it (Debian, Ubuntu: apt install python3 python3-venv) or set PYTHON" >&2
  exit 2
fi
if ! [ -x .venv/bin/pip ] && ! "$python" -m venv .venv; then
  rm -rf .venv
  echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
  exit 2
fi

# Installs only when setup.py or the request has changed since the last time.
install() {
  local stamp
  stamp="$(cat setup.py; echo "$@")"
  if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
    echo "installing: $*"
    .venv/bin/pip install --quiet --disable-pip-version-check "$@"
    printf '%s\n' "$stamp" > .venv/installed
  fi
}
