#!/usr/bin/env bash
# torch 2.14.1, an AMD EPYC with AVX512: in float32, `log1p`, `expm1` and `softplus` take five to twenty times as long with
# PyTorch's AVX512 kernels, which it chooses there, as with its AVX2 kernels (ATEN_CPU_CAPABILITY=avx2), and
# `binary_cross_entropy_with_logits`, which computes `log1p`, about four times. `log`, `exp` and `sigmoid` do not, nor
# does `log1p` in float64, which is then faster than in float32. Expected: AVX512 at least as fast. In an update of a small
# VAE, whose loss it is, that was a quarter of the time.
#
# Usage: PYTHON=python3.12 findings/torch-log1p-avx512-amd.sh      (installs into a temporary folder)
set -euo pipefail
if ! grep -q AuthenticAMD /proc/cpuinfo || ! grep -q avx512vl /proc/cpuinfo; then
  echo "not checked: this needs an AMD CPU with AVX512" >&2
  exit 2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.3.5
cd "$folder"
cat > times.py <<'END'
import json
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
x, images = torch.rand(128, 1024), torch.rand(128, 1024)  # a batch of 32 x 32 images
double = x.double()
WAYS = {
    "log1p": x.log1p,
    "expm1": x.expm1,
    "softplus": lambda: F.softplus(x),
    "binary_cross_entropy_with_logits": lambda: F.binary_cross_entropy_with_logits(x, images),
    "log": x.log,
    "exp": x.exp,
    "sigmoid": x.sigmoid,
    "log1p in float64": double.log1p,
}
times = dict.fromkeys(WAYS, float("inf"))
for _ in range(50):  # in turn; the least time is the one without other programs
    for name, way in WAYS.items():
        start = time.perf_counter()
        way()
        times[name] = min(times[name], 1000 * (time.perf_counter() - start))
print(json.dumps({"kernels": torch.backends.cpu.get_cpu_capability(), "milliseconds": times}))
END
"$folder/venv/bin/python" times.py > avx512.json
ATEN_CPU_CAPABILITY=avx2 "$folder/venv/bin/python" times.py > avx2.json
"$folder/venv/bin/python" - <<'END'
import json
from pathlib import Path

wide, narrow = (json.loads(Path(name).read_text()) for name in ("avx512.json", "avx2.json"))
assert (wide["kernels"], narrow["kernels"]) == ("AVX512", "AVX2"), "the behaviour has changed: other kernels"
print("torch 2.14.1, one thread, milliseconds for 128 x 1024 values:")
ratio = {}
for name, long in wide["milliseconds"].items():
    short = narrow["milliseconds"][name]
    ratio[name] = long / short
    print(f"{name:33} AVX512 {long:.3f}, AVX2 {short:.3f}: {ratio[name]:.1f} times")
slow, fast = [*ratio.values()][:4], [*ratio.values()][4:]
assert min(slow) > 2.5, "the behaviour has changed: AVX512 is fast"
assert max(fast) < 2, "the behaviour has changed: AVX512 is slow in other functions, too"
assert wide["milliseconds"]["log1p"] > 2 * wide["milliseconds"]["log1p in float64"], "the behaviour has changed"
END
