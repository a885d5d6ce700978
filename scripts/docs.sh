#!/usr/bin/env bash
# Writes docs/systems.md from what the command says of its mechanisms, or with --check fails where it is out of date.
#
#   scripts/docs.sh build/bin/heed [--check]
set -euo pipefail
cd "$(dirname "$0")/.."
heed=${1:?usage: scripts/docs.sh HEED [--check]}

page() {
  printf '# The mechanisms\n\nWritten by `heed list --markdown`; `heed explain NAME` tells how one works. Which to take: [choosing.md](choosing.md).\n\n'
  "$heed" list --markdown
}

if [[ ${2:-} == --check ]]; then
  page | diff -u docs/systems.md - || { echo "docs/systems.md is out of date: make docs" >&2; exit 1; }
else
  page > docs/systems.md
fi
