#!/bin/sh
# mypy strict over the package. The checkout's folder may have any name, so it is checked through a link named routesae.
set -eu
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$PWD" "$links/routesae"
MYPYPATH="$links" "$PYTHON" -m mypy --config-file pyproject.toml -p routesae
