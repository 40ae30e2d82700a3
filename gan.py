"""Networks and loss of WGAN-GP (Gulrajani et al. 2017, arXiv 1704.00028).

Two convolutional networks for 32x32 images, and the critic's loss of their Algorithm 1. `models.py` makes
the generator of a scholar out of them. Images are (n, channels, 32, 32) float in [0, 1] throughout.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGE_SIZE = 32


class Network(nn.Sequential):
    """A chain of layers. With a `compute_dtype` (torch.bfloat16) it computes in that and answers in float32."""

    compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is None:
            return super().forward(x)
        # One autocast region a forward: its cache of cast weights must not outlive an optimiser step.
        with torch.autocast(x.device.type, self.compute_dtype):
            return super().forward(x).float()

    def frozen(self) -> "Network":
        """A copy that only answers, in evaluation mode, and does it in fewer passes over memory.

        Batch normalisation, then a fixed scale and shift, is multiplied into the convolution before it, and weights are
        kept in the compute_dtype. Layers of other kinds, a subclass's too, may do more than that: they are copied as
        they are, as is a network that is more than a chain of its layers.
        """
        if type(self).forward is not Network.forward:
            return copy.deepcopy(self).eval().requires_grad_(False)
        layers: list[nn.Module] = []
        for layer in copy.deepcopy(self).eval().requires_grad_(False):
            fixed = type(layer) is nn.BatchNorm2d and layer.track_running_stats
            if fixed and layers and can_be_scaled(layers[-1]):
                transpose = isinstance(layers[-1], nn.ConvTranspose2d)
                layers[-1] = fuse_conv_bn_eval(layers[-1], layer, transpose=transpose)
            else:
                layers.append(layer)
        for layer in layers:
            if type(layer) in (*CONVOLUTIONS, nn.BatchNorm2d, nn.Linear):
                layer.to(self.compute_dtype)
        network = Network(*layers).eval().requires_grad_(False)
        network.compute_dtype = self.compute_dtype
        return network


def can_be_scaled(layer: nn.Module) -> bool:
    """Whether it is a convolution with a weight of its own, not one that is computed anew each time (spectral norm)."""
    plain = type(layer) in CONVOLUTIONS and not (layer.transposed and layer.groups > 1)
    return plain and "weight" in dict(layer.named_parameters(recurse=False))


class Patches(torch.autograd.Function):
    """What a k x k window sees at each of its places, side by side.

    From x (n, height, width, channels) to (n, rows, columns, k, k, channels).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, stride: int) -> Tensor:
        ctx.how = x.shape, k, stride
        return x.unfold(1, k, stride).unfold(2, k, stride).permute(0, 1, 2, 4, 5, 3).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return SumOfPatches.apply(gradient, *ctx.how), None, None


class SumOfPatches(torch.autograd.Function):
    """Patches added up where they were seen. This and `Patches` are each other's derivative.

    The derivative that `unfold` has comes to the same, to the last bit, and takes ten times as long.
    """

    @staticmethod
    def forward(ctx: Any, patches: Tensor, shape: torch.Size, k: int, stride: int) -> Tensor:
        ctx.how = k, stride
        n, rows, columns, *_, channels = patches.shape
        strips = patches.new_zeros(n, rows, shape[2], k, channels)  # as wide as x
        for j in reversed(range(k)):  # as rounding depends on the order
            strips[:, :, j : j + stride * columns : stride] += patches[:, :, :, :, j]
        x = patches.new_zeros(shape)
        for i in reversed(range(k)):
            x[:, i : i + stride * rows : stride] += strips[:, :, :, i]
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return Patches.apply(gradient, *ctx.how), None, None, None


class Convolution(nn.Conv2d):
    """A square convolution, neither grouped nor dilated, padded with zeros.

    On the CPU, it is a product of two matrices where it has at least as many channels as places: there, PyTorch's own
    spends most of its time on laying out weights and their gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        (k, _), (stride, _), (padding, _) = self.kernel_size, self.stride, self.padding
        height, width = ((side + 2 * padding - k) // stride + 1 for side in x.shape[2:])
        places = len(x) * height * width
        if x.device.type != "cpu" or places > self.out_channels:
            return super().forward(x)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
        patches = Patches.apply(x, k, stride)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        y = F.linear(patches.view(places, weight.shape[1]), weight, self.bias)  # (places, out_channels)
        return y.view(len(x), height, width, self.out_channels).permute(0, 3, 1, 2)


CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, Convolution)


class LeakyReLU(nn.LeakyReLU):
    """x where it is positive, elsewhere slope * x: here as x times a constant, which has no derivative.

    PyTorch's own has a second derivative, of zeros, which the penalty's backward pass takes through the whole critic.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * x.detach().sign().clamp_(min=self.negative_slope)


class Sigmoid(nn.Sigmoid):
    """In float32 at least: in bfloat16 it is exactly 1, without a gradient, from 6.25 on."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


def generator_network(*, z_size: int, channel_size: int, image_channels: int) -> Network:
    """The network from noise (n, z_size), standard normal, to images.

    It may normalise its batch: only the critic's gradient penalty asks for independent samples.
    """
    c = channel_size

    def upsample(channels_in: int, channels_out: int) -> list[nn.Module]:
        return [
            nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        ]

    return Network(
        nn.Linear(z_size, 8 * c * 4 * 4, bias=False),
        nn.Unflatten(1, (8 * c, 4, 4)),  # (n, 8c, 4, 4)
        nn.BatchNorm2d(8 * c),
        nn.ReLU(inplace=True),
        *upsample(8 * c, 4 * c),  # (n, 4c, 8, 8)
        *upsample(4 * c, 2 * c),  # (n, 2c, 16, 16)
        *upsample(2 * c, c),  # (n, c, 32, 32)
        nn.Conv2d(c, image_channels, 3, padding=1),
        Sigmoid(),  # (n, image_channels, 32, 32)
    )


def critic_network(*, channel_size: int, image_channels: int) -> Network:
    """The network from images to scores (n, 1). No batch normalisation: a score depends on its image alone."""
    c = channel_size

    def downsample(channels_in: int, channels_out: int) -> list[nn.Module]:
        return [Convolution(channels_in, channels_out, 4, stride=2, padding=1), LeakyReLU(0.2)]

    return Network(
        *downsample(image_channels, c),  # (n, c, 16, 16)
        *downsample(c, 2 * c),  # (n, 2c, 8, 8)
        *downsample(2 * c, 4 * c),  # (n, 4c, 4, 4)
        *downsample(4 * c, 8 * c),  # (n, 8c, 2, 2)
        nn.Flatten(),
        nn.Linear(8 * c * 2 * 2, 1),
    )


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """E[(||grad D(x^)||_2 - 1)^2], x^ uniform between each real image and its fake partner (Algorithm 1, lines 6, 7).

    The norm is taken over all values of an image together: channels, rows and columns.
    """
    epsilon = torch.rand(len(real), 1, 1, 1, dtype=real.dtype, device=real.device)
    x_hat = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
    # A score depends on its own image alone, so the gradient of the sum holds every image's own gradient.
    (gradient,) = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, *, penalty_weight: float) -> tuple[Tensor, Tensor]:
    """The critic's loss D(fake) - D(real) + lambda * penalty, and its estimate D(real) - D(fake) of the distance.

    real, fake: (n, channels, 32, 32), of equal n; fake without a graph behind it. Returns two scalars, the second
    detached.
    """
    real_score, fake_score = critic(torch.cat([real, fake])).chunk(2)
    distance = real_score.mean() - fake_score.mean()
    return penalty_weight * gradient_penalty(critic, real, fake) - distance, distance.detach()


def generator_loss(critic: nn.Module, fake: Tensor) -> Tensor:
    """The generator's loss -D(fake) (Algorithm 1, line 12)."""
    return -critic(fake).mean()
