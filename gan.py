"""Algorithm 1 of WGAN-GP (Gulrajani et al. 2017, arXiv 1704.00028): what the critic and the generator minimise.

These are pure functions of networks and images. The networks, and the loop around the losses (five critic updates, then
one generator update), are in `models.WGAN`. Images are (n, channels, height, width) float in [0, 1].

To change what the critic minimises, change it here, and take `models.critic_gradients` out of `WGAN.critic_step`: on a
CPU it computes these gradients by hand, faster (a test compares the two).
"""

import torch
from torch import Tensor, nn


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """E[(||grad D(x^)||_2 - 1)^2], x^ uniform between each real image and its fake partner (lines 5 to 7).

    real, fake: (n, channels, height, width), of equal n. Returns a scalar. The norm is taken over all values of an
    image together: channels, rows and columns.
    """
    epsilon = torch.rand(len(real), 1, 1, 1, dtype=real.dtype, device=real.device)
    x_hat = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
    # Each score depends on its own image alone, so the gradient of their sum holds every image's own gradient.
    (gradient,) = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, *, penalty_weight: float) -> tuple[Tensor, Tensor]:
    """The critic's loss D(fake) - D(real) + lambda * penalty, and its estimate D(real) - D(fake) of the distance.

    real, fake: (n, channels, height, width), of equal n; fake must not carry a graph. Returns two scalars, the second
    one detached.
    """
    real_score, fake_score = critic(torch.cat([real, fake])).chunk(2)
    distance = real_score.mean() - fake_score.mean()
    return penalty_weight * gradient_penalty(critic, real, fake) - distance, distance.detach()


def generator_loss(critic: nn.Module, fake: Tensor) -> Tensor:
    """The generator's loss -D(fake) (line 12). fake: (n, channels, height, width). Returns a scalar."""
    return -critic(fake).mean()
