#!/usr/bin/env bash
# `pip install .` into an environment of its own, which sees the packages of another, and heed as Python's users meet it.
#
#   tests/outside/pip.sh PYTHON FOLDER
set -euo pipefail
python=${1:?usage: pip.sh PYTHON FOLDER} folder=${2:?usage: pip.sh PYTHON FOLDER}
cd "$(dirname "$0")/../.."

packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

rm -rf "$folder"
"$python" -m venv "$folder"
for package in "$(packages "$python")"/*; do
  [[ $package == */heed* || -e $(packages "$folder/bin/python")/${package##*/} ]] ||
    ln -s "$package" "$(packages "$folder/bin/python")/"
done
# No network: what builds is there.
"$folder/bin/pip" install -q --disable-pip-version-check --no-build-isolation --no-deps --config-settings build-dir="$folder/build" .

cd /
"$folder/bin/python" - "$folder" << 'END'
import sys

import numpy as np

import heed

assert heed.__file__.startswith(sys.argv[1]), heed.__file__
x = np.random.default_rng(0).standard_normal((1, 2, 50, 16), np.float32)
o = heed.attend(x, x, x, "moba", block=16, top_k=2)
assert o.shape == x.shape
try:
    import torch
except ImportError:
    print("skipped: no torch here")
else:
    q = torch.from_numpy(x).requires_grad_()
    same = heed.attend(q, q, q, "moba", block=16, top_k=2)
    assert (same.detach().numpy() == o).all()
    same.sum().backward()
    assert q.grad.isfinite().all()
print("heed", heed.__version__, "of", heed.__file__)
END
