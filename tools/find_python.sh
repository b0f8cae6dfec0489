#!/usr/bin/env bash
# find_python.sh: print a Python that this project supports. Each candidate is run, since its name may exist without working (pyenv's shims).
#
#   PYTHON   use this one, or fail
set -u
in_range='import sys, ensurepip, venv; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))'  # as in setup.py

works() { "$1" -c "$in_range" >/dev/null 2>&1; }

if [[ -n "${PYTHON:-}" ]]; then
    works "$PYTHON" && echo "$PYTHON" && exit
    echo "make: PYTHON=$PYTHON is not a Python 3.12 or 3.13 with venv (--version: $("$PYTHON" --version 2>&1 || true)); name another," \
        "or leave PYTHON out." >&2
    exit 1
fi
shopt -s nullglob
pyenv="${PYENV_ROOT:-$HOME/.pyenv}/versions"
# The oldest version first: GPU images have it, so it is the most used.
for candidate in python3 python3.12 python3.13 "$pyenv"/3.12*/bin/python "$pyenv"/3.13*/bin/python; do
    works "$candidate" && echo "$candidate" && exit
done
if command -v uv >/dev/null; then
    for version in 3.12 3.13; do
        candidate="$(uv python find --no-project "$version" 2>/dev/null)" && works "$candidate" && echo "$candidate" && exit
    done
fi
cat >&2 <<'END'
make: there is no Python 3.12 or 3.13 here: not as python3, python3.12 or python3.13, not under pyenv, not in uv. Install one, and run this again:
    apt install python3.12 python3.12-venv      # Ubuntu 24.04; other systems have similar packages
    pyenv install 3.12                          # pyenv
    uv python install 3.12                      # uv (https://docs.astral.sh/uv), without being root
or name one: make PYTHON=/path/to/python3.12
END
exit 1
