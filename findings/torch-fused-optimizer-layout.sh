#!/usr/bin/env bash
# torch 2.14.1: on the CPU, fused optimisers pair weights and gradients by their place in memory. If `.grad` has another
# memory layout than its weight, as `torch.autograd.grad` returns it for a convolution of channels-last images, each
# weight is moved by the gradient of another one, without an error or a warning. Expected: the step of `fused=False`, or
# the error that a GPU raises ("same dtype, device, and layout"). `backward()` gives `.grad` the weight's layout; who
# fills `.grad` by hand must copy it into `torch.empty_like(weight)`.
#
# Usage: PYTHON=python3.12 findings/torch-fused-optimizer-layout.sh      (installs into a temporary folder)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import torch


def moved(optimiser, fused, by_backward):
    """How far one step moves the weights of a convolution, and whether `.grad` has their layout."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 4, 3, bias=False)
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    loss = layer(images).square().sum()
    if by_backward:
        loss.backward()
    else:
        (layer.weight.grad,) = torch.autograd.grad(loss, layer.weight)
    before = layer.weight.detach().clone()
    optimiser([layer.weight], lr=0.01, fused=fused).step()
    return layer.weight.detach() - before, layer.weight.grad.stride() == layer.weight.stride()


print(f"torch {torch.__version__}, step of the fused optimiser compared with the plain one:")
wrong = []
for optimiser in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
    for by_backward in (True, False):
        plain, _ = moved(optimiser, False, by_backward)
        fused, same_layout = moved(optimiser, True, by_backward)
        far = (fused - plain).abs() > plain.abs().max() / 100
        share = far.float().mean().item()
        source = "backward()" if by_backward else "autograd.grad"
        print(f"{optimiser.__name__:8} gradient of {source:14} same layout: {same_layout!s:5}  weights moved wrongly: {share:.0%}")
        wrong.append((same_layout, share > 0.1))
assert wrong == [(True, False), (False, True)] * 4, "the behaviour has changed"
END
