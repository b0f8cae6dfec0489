#!/usr/bin/env bash
# install.sh VENV ARGUMENTS…: `pip install ARGUMENTS…` into a virtual environment, by uv if available: it takes a quarter of the time.
set -eu
venv="$1"
shift
python="$venv/bin/python"

"$python" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' || {  # as in setup.py
    echo "make: $venv has $("$python" --version), not 3.12 or 3.13; delete it (rm -r $venv) and run the same command again." >&2
    exit 1
}
uv="$(command -v uv || echo "$venv/bin/uv")"
if [[ ! -x "$uv" ]]; then
    timeout 120 "$python" -m pip --disable-pip-version-check install --quiet 'uv>=0.9,<1' || true
fi
if [[ -x "$uv" ]]; then
    "$uv" pip install --quiet --python "$python" "$@" && exit
fi
# uv does not read pip's settings, such as another index.
echo "make: installing with pip instead, which takes some minutes" >&2
exec "$python" -m pip --disable-pip-version-check install --quiet "$@"
