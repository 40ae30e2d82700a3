"""The method written for reading and nothing else; tests compare the program's updates with it.

One image and one step at a time, as the papers put it: no batches of several sources, no blocks of replayed pairs, and
PyTorch's own layers. Random numbers are drawn in the program's order: inputs, noise, epsilon.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn


def plain(network, options):
    """A copy of a network with PyTorch's own layers and layout, and plain Adam for it."""
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    for module in network.modules():
        for own in (nn.Conv2d, nn.ConvTranspose2d, nn.LeakyReLU):
            if isinstance(module, own):
                module.__class__ = own
    settings = {"betas": (options.beta1, options.beta2), "weight_decay": options.weight_decay, "foreach": False}
    return network, torch.optim.Adam(network.parameters(), options.lr, **settings)


def image_penalty(critic, real, fake, epsilon):
    """(||grad_x^ D(x^)||_2 - 1)^2 for one image (channels, 32, 32)."""
    x_hat = (epsilon * real + (1 - epsilon) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x_hat[None])[0, 0], x_hat, create_graph=True)
    return (torch.sqrt((gradient**2).sum()) - 1) ** 2


def critic_loss(critic, real, fake, epsilon, penalty_weight):
    """The mean over images of D(x~) - D(x) + lambda * penalty (Gulrajani et al. 2017, Algorithm 1, line 7)."""
    losses = []
    for x, x_tilde, e in zip(real, fake, epsilon, strict=True):
        wasserstein = critic(x_tilde[None])[0, 0] - critic(x[None])[0, 0]
        losses.append(wasserstein + penalty_weight * image_penalty(critic, x, x_tilde, e))
    return sum(losses) / len(losses)


def wgan_gp_iteration(net, critic, optimiser, critic_optimiser, inputs, z_size, critic_updates, penalty_weight):
    """One generator iteration of WGAN-GP (Gulrajani et al. 2017, Algorithm 1, lines 2-12). Returns its losses."""
    for _ in range(critic_updates):
        real = inputs()
        fake = net(torch.randn(len(real), z_size, dtype=real.dtype)).detach()
        epsilon = torch.rand(len(real), 1, 1, 1, dtype=real.dtype)
        loss = critic_loss(critic, real, fake, epsilon, penalty_weight)
        distance = critic(real).mean() - critic(fake).mean()
        critic_optimiser.zero_grad()
        loss.backward()
        critic_optimiser.step()
    generator_loss = -critic(net(torch.randn(len(real), z_size, dtype=real.dtype))).mean()
    optimiser.zero_grad()
    generator_loss.backward()
    optimiser.step()
    return {"critic-loss": loss, "wasserstein": distance, "generator-loss": generator_loss}


def fisher_information(net, images, classes):
    """The mean over images of (d log p(y|x) / d theta)^2, y being the class given: one tensor per parameter."""
    sums = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for x, y in zip(images, classes, strict=True):
        net.zero_grad()
        F.log_softmax(net(x[None])[0], dim=0)[y].backward()
        for total, parameter in zip(sums, net.parameters(), strict=True):
            total += parameter.grad**2
    return [total / len(images) for total in sums]


def elastic_penalty(parameters, old_tasks, weight):
    """lambda / 2 * sum F (theta - theta*)^2 over old tasks and parameters (Kirkpatrick et al. 2017, equation 3)."""
    total = 0
    for fisher, anchor in old_tasks:
        for theta, f, theta_star in zip(parameters, fisher, anchor, strict=True):
            total = total + (f * (theta - theta_star) ** 2).sum()
    return weight / 2 * total


def equation_1(solver, x, y, x_replayed, y_replayed, r):
    """L = r * E_D[loss(S(x), y)] + (1 - r) * E_G[loss(S(x'), y')] (Shin et al. 2017), pair by pair."""
    scores = solver(torch.cat([x, x_replayed]))  # one forward pass: S may normalise its batch
    n = len(x)
    current = sum(-F.log_softmax(scores[i], dim=0)[y[i]] for i in range(n)) / n
    replayed = sum(-F.log_softmax(scores[n + i], dim=0)[y_replayed[i]] for i in range(len(x_replayed)))
    return r * current + (1 - r) * replayed / len(x_replayed)
