#!/usr/bin/env bash
# torch 2.14.1: Adam with the usual small `weight_decay` shrinks weights without a gradient, such as those of pixels that
# are always black, to the smallest numbers there are (about 1e-38) within 1500 steps (with the betas of WGAN-GP), and a
# sixth of them to denormal numbers. Expected: next to no change in that time, as with AdamW or SGD, or zero. Adam
# divides the decay, their only gradient, by its own size. Some CPUs multiply denormal numbers 200 times slower than others
# (times are printed, not checked), so float32 training slows down for no visible reason.
# `torch.set_flush_denormal(True)`, called before PyTorch starts threads, makes them zeros.
#
# Usage: PYTHON=python3.12 findings/torch-adam-weight-decay-denormals.sh      (installs into a temporary folder)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import time

import torch

torch.set_num_threads(1)
SMALLEST = torch.finfo(torch.float32).tiny  # of the normal numbers


def unseen_weights(optimiser, steps):
    """The weights of inputs that are always 0, after so many steps, and the milliseconds of a product with them."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(1024, 512)
    betas = {} if optimiser is torch.optim.SGD else {"betas": (0.5, 0.9)}  # those of WGAN-GP
    optimiser = optimiser(layer.parameters(), lr=1e-3, weight_decay=1e-5, **betas)
    for _ in range(steps):
        x = torch.rand(16, 1024)
        x[:, :512] = 0
        optimiser.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimiser.step()
    weight, x = layer.weight.detach()[:, :512].contiguous(), torch.rand(256, 512)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x @ weight.T
        times.append(1000 * (time.perf_counter() - start))
    return weight.abs(), min(times)


print(f"torch {torch.__version__}, weights of inputs that are always 0:")
shares = {}
for optimiser in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
    for steps in (0, 1500):
        weight, milliseconds = unseen_weights(optimiser, steps)
        denormal = ((weight > 0) & (weight < SMALLEST)).float().mean().item()
        shares[optimiser.__name__, steps] = denormal, weight.mean().item()
        print(
            f"{optimiser.__name__:6} {steps:4} steps: {denormal:4.0%} denormal, {(weight == 0).float().mean():4.0%} zero,"
            f" mean size {weight.mean():.2g}, a product with them {milliseconds:.2f} ms"
        )
assert all(denormal == 0 for (_, steps), (denormal, _) in shares.items() if steps == 0), "the behaviour has changed"
assert shares["Adam", 1500][0] > 0.05 and shares["Adam", 1500][1] < 1e-36, "the behaviour has changed: Adam"
for name in ("AdamW", "SGD"):
    assert shares[name, 1500][0] == 0 and shares[name, 1500][1] > 0.9 * shares[name, 0][1], f"the behaviour has changed: {name}"
END
