#!/usr/bin/env bash
# torchgan 0.1.0: the gradient penalty of WGAN-GP, `WassersteinGradientPenalty`, takes one norm over the gradients of the whole
# batch instead of one per image. In a batch of 64, a critic with slope 1 at every image has a penalty of 49, and the one
# that the penalty leads to has slope 1/8: the critic's scores, and so the estimated distance, shrink with the root of the
# batch size. Also, one random point between real and generated is shared by the batch, and `reduction` has no effect.
# Expected (Gulrajani et al. 2017, algorithm 1): a norm and a point per image; penalty 0 and slope 1 for every batch size.
# `dragan_gradient_penalty` has the same norm. Write the penalty by hand.
#
# Usage: PYTHON=python3.12 findings/torchgan-gradient-penalty-of-the-batch.sh      (installs into a temporary folder)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torchgan==0.1.0 torch==2.14.1 torchvision==0.29.1 \
    numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'END'
import importlib.metadata

import torch
from torchgan.losses import WassersteinGradientPenalty
from torchgan.models import Discriminator, Generator

torch.set_num_threads(1)
torch.manual_seed(0)


class Critic(Discriminator):
    """Linear, so that its slope is the same at every image."""

    def __init__(self):
        super().__init__(64, "none")
        self.linear = torch.nn.Linear(64, 1, bias=False)
        with torch.no_grad():
            self.linear.weight /= self.linear.weight.norm()

    def forward(self, x):
        self.seen = x.detach()
        return self.linear(x)

    def slope(self):
        return self.linear.weight.norm().item()


class Ones(Generator):
    def __init__(self):
        super().__init__(8, "none")

    def forward(self, z):
        return torch.ones(len(z), 64, requires_grad=True)


def by_image(x, scores):
    """The penalty of the paper."""
    (gradients,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return (gradients.norm(dim=1) - 1).square().mean()


print(f"torchgan {importlib.metadata.version('torchgan')}, gradient penalty:")
for batch in (1, 16, 64):
    critic, x = Critic(), torch.randn(batch, 64, requires_grad=True)
    library = WassersteinGradientPenalty()(x, critic(x)).item()
    paper = by_image(x, critic(x)).item()
    optimiser = torch.optim.SGD(critic.parameters(), lr=0.1 / batch)
    for _ in range(200):  # updates by the penalty alone
        WassersteinGradientPenalty(lambd=1).train_ops(Ones(), critic, optimiser, torch.zeros(batch, 64), "cpu")
    points = critic.seen[:, 0].unique().numel()
    print(
        f"batch {batch:2}: critic of slope 1: {library:5.2f}, norm per image: {paper:.2f};"
        f" slope that it leads to: {critic.slope():.3f}; different points between real and generated: {points}"
    )
    assert abs(library - (batch**0.5 - 1) ** 2) < 1e-3 and abs(paper) < 1e-6, "the behaviour has changed"
    assert abs(critic.slope() - batch**-0.5) < 1e-3 and points == 1, "the behaviour has changed"
END
