#!/usr/bin/env bash
# torch 2.14.1, CPU: `binary_cross_entropy` of probabilities takes four to seven times as long as the same loss of scores,
# `binary_cross_entropy_with_logits`, although the latter does more (it includes the sigmoid) and `log` and `log1p` by
# themselves are fast. In a small VAE, whose reconstruction error it is, it took a sixth of an update. Expected: much the
# same time, as both are a few passes over the images. Losses and gradients are equal. (With AVX2 kernels; with those for
# AVX512, an AMD is slow in `log1p`, too: torch-log1p-avx512-amd.sh.)
#
# Usage: PYTHON=python3.12 findings/torch-binary-cross-entropy-cpu.sh      (installs into a temporary folder)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.3.5
cd "$folder"
ATEN_CPU_CAPABILITY=avx2 "$folder/venv/bin/python" - <<'END'
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
scores, images = torch.randn(128, 1024, requires_grad=True), torch.rand(128, 1024)  # a batch of 32 x 32 images
WAYS = {
    "binary_cross_entropy": lambda: F.binary_cross_entropy(scores.sigmoid(), images),
    "binary_cross_entropy_with_logits": lambda: F.binary_cross_entropy_with_logits(scores, images),
    "by hand, with log and log1p": lambda: -(images * (p := scores.sigmoid()).log() + (1 - images) * (-p).log1p()).mean(),
}
losses = {name: way() for name, way in WAYS.items()}
gradients = {name: torch.autograd.grad(loss, scores)[0] for name, loss in losses.items()}
times = {name: [] for name in WAYS}
with torch.no_grad():
    for _ in range(30):  # in turn
        for name, way in WAYS.items():
            start = time.perf_counter()
            way()
            times[name].append(1000 * (time.perf_counter() - start))
times = {name: min(values) for name, values in times.items()}  # the least is the one without other programs
print(f"torch {torch.__version__}, one thread:")
for name, milliseconds in times.items():
    print(f"{name:33} {milliseconds:.2f} ms, loss {losses[name].item():.6f}")
slow, fast, hand = times.values()
first, *others = WAYS
for name in others:
    torch.testing.assert_close(losses[name], losses[first])
    torch.testing.assert_close(gradients[name], gradients[first])
assert slow > 2.5 * fast, "the behaviour has changed"
assert slow > 2 * hand, "the behaviour has changed: log and log1p are slow, too"
END
