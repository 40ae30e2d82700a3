#!/usr/bin/env bash
# torch 2.14.1: what compiles nothing loads the compiler, torch._dynamo and torch._inductor. The first optimiser of a
# process does, of any kind; `torch.use_deterministic_algorithms(False)` does, which asks for nothing; and so does
# `import torchvision` (0.29.1, for torchvision.ops.roi_align). These are 900 modules and nearly as much time as `import
# torch` itself, for a short command a good part of its life, and a program of many processes pays in each. Expected:
# the compiler is loaded by who compiles, as by `torch.compile`.
#
# Usage: PYTHON=python3.12 findings/torch-compiler-loaded-by-optimisers.sh      (installs into a temporary folder)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 numpy==2.3.5
cd "$folder"
cat > load.py <<'END'
import sys
import time

import torch

start, modules = time.process_time(), len(sys.modules)
assert "torch._dynamo" not in sys.modules
weights = [torch.nn.Parameter(torch.zeros(3))]
exec(sys.argv[1])
print(
    f"{sys.argv[1]:45} {len(sys.modules) - modules:5} modules, {time.process_time() - start:4.1f} s of the CPU,",
    "compiler" if {"torch._dynamo", "torch._inductor"} <= sys.modules.keys() else "-",
)
END
"$folder/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
{
    "$folder/venv/bin/python" load.py "weights[0].sum().backward()"
    "$folder/venv/bin/python" load.py "torch.optim.SGD(weights, lr=0.1)"
    "$folder/venv/bin/python" load.py "torch.optim.Adam(weights)"
    "$folder/venv/bin/python" load.py "torch.use_deterministic_algorithms(False)"
    "$folder/venv/bin/python" load.py "import torchvision"
} | tee seen
found=$(awk '{print $NF}' seen | paste -sd' ')
test "$found" = "- compiler compiler compiler compiler" || { echo "the behaviour has changed: $found"; exit 1; }
