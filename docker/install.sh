#!/bin/sh
# Install SAGE into a new virtual environment, with the versions in constraints.txt: docker/install.sh FOLDER
# PYTHON: interpreter of the environment. TORCH_INDEX_URL: package index that provides torch; default: pip's index.
set -eu
target=${1:?usage: docker/install.sh FOLDER}
source=$(cd "$(dirname "$0")/.." && pwd)

install() {
  "$target/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$source/constraints.txt" "$@"
}

"${PYTHON:-python3}" -m venv "$target"
install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
install hatchling
packages=$source/packages
install --no-build-isolation "$packages/sage-common" "$packages/sage-libs[train,preference]" "$packages/sage-llm-client" \
  "$packages/sage-llm-core[embedding,postgresql]" "$packages/sage-llm-gateway" "$packages/sage-cli" "$packages/sage-studio"
