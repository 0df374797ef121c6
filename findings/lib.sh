# What the findings share: a temporary folder with an environment of its own. Sourced by each.
# shellcheck shell=bash
set -euo pipefail
umask 077
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"

# install PACKAGE==VERSION …: only wheels of the package index, into the environment; nothing of this repository.
install() {
    "${PYTHON:-python3}" -m venv environment
    environment/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: "$@"
}

# run: the program on standard input, by the environment; its exit code is that of the finding.
run() {
    env -u PYTHONPATH environment/bin/python -
}
