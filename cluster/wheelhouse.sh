#!/usr/bin/env bash
# Fills a folder with all that an installation without internet needs, pinned by constraints.txt and built: only wheels.
#
#   cluster/wheelhouse.sh OUT [PACKAGE ...]       # on a machine with internet, of the cluster's system and Python
#   cluster/wheelhouse.sh --dry-run OUT           # only say what would be run
#
# PACKAGE are further ones, e.g. s3fs. Variables: PYTHON (python3), TORCH (torch==2.13.0), as for make install.
set -euo pipefail
run() { "$@"; }
if [ "${1:-}" = --dry-run ]; then
    run() { echo "$@"; }
    shift
fi
out=${1:?where to? cluster/wheelhouse.sh [--dry-run] OUT [PACKAGE ...]}
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}

run mkdir -p "$out"
# the wheel of torch decides on what it needs in turn; $torch may end in an index of its own
# shellcheck disable=SC2086
run "$python" -m pip wheel --wheel-dir "$out" --no-deps $torch
run "$python" -m pip wheel --wheel-dir "$out" --find-links "$out" -c "$root/constraints.txt" "${torch%% *}" setuptools "$root" "$@"
run cp "$root/constraints.txt" "$out/constraints.txt"
# what the cluster will do, from these wheels alone: nothing is missing, and nothing must be built there
run "$python" -m pip install --dry-run --quiet --ignore-installed --no-index --only-binary :all: --find-links "$out" \
    -c "$out/constraints.txt" dydit_scale "$@"
echo "on the cluster: pip install --no-index --only-binary :all: --find-links $out -c $out/constraints.txt dydit_scale"
