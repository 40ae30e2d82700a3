"""Generators and solvers: the networks, how they learn, and the device and number format they compute in.

`WGAN`, `VAE`, `Flow` and `ConvFlow` learn the inputs, `CNN` and `MLP` the answers, through the interfaces in `dgr.py`.
To add one, write a class like these and add a line to `GENERATORS` or `SOLVERS`; its options are fields of the
dataclasses below.
"""

import argparse
import copy
import gc
import hashlib
import importlib
import itertools
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dgr
import gan
import utils
from utils import UserError, load_checkpoint, option, reading, reason, save_checkpoint, warn

DTYPES = (
    "number format of the networks; auto: bfloat16 where it is faster (CPUs with AMX, AMD with AVX512-BF16, GPUs with "
    "--cuda-graphs), tf32 on other GPUs"
)

AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # the CPU multiplies matrices in bfloat16

SIZES = "height and width of images in all networks: a multiple of 16 from 16 to 128, or 28 (not wgan, conv-flow)"


def class_of(known: Callable[[], dict[str, Any]], base: type) -> Callable[[str], str]:
    """A function that reads one of these names, or MODULE:CLASS of a module that Python finds from here."""

    def parse(text: str) -> str:
        module, _, name = text.partition(":")
        if text not in known() and not name:
            raise argparse.ArgumentTypeError(f"{text!r} is neither one of {', '.join(known())} nor MODULE:CLASS")
        if text not in known():
            sys.path += [] if os.getcwd() in sys.path else [os.getcwd()]
            try:
                found = getattr(importlib.import_module(module), name)
            except (Exception, SystemExit) as error:  # whatever a module does while it is imported
                raise argparse.ArgumentTypeError(f"{text!r} can't be imported: {reason(error)[:200]}") from error
            if not (isinstance(found, type) and issubclass(found, base)) or found is base:
                raise argparse.ArgumentTypeError(f"{text!r} is no subclass of dgr.{base.__name__}")
            known()[text] = found
        return text

    return parse


@dataclass(frozen=True, kw_only=True)
class ScholarOptions:
    """What a scholar is made of."""

    image_size: int = option(32, SIZES, "networks", choices=(*range(16, 129, 16), 28), metavar="N", group="images")
    generator: str = option(
        "wgan", "WGAN-GP, VAE, flow matching (linear layers or convolutions), or your own MODULE:CLASS", "networks",
        choices=lambda: GENERATORS, parse=class_of(lambda: GENERATORS, dgr.Generator), group="generator",
        metavar="{wgan,vae,flow,conv-flow,MODULE:CLASS}",
    )  # fmt: skip
    generator_lambda: float = option(10.0, "weight of the gradient penalty (wgan)", low=0)
    generator_z_size: int = option(100, "size of the noise (wgan, vae)", "networks", low=1)
    generator_c_channel_size: int = option(64, "channels of the critic's first layer (wgan)", "networks", low=1)
    generator_g_channel_size: int = option(
        64, "channels of the last hidden layer (wgan), half of them (conv-flow), or units / 16 (vae), / 32 (flow)",
        "networks", low=1,
    )  # fmt: skip
    generator_c_updates_per_g_update: int = option(5, "critic updates per generator update (wgan)", low=1)
    generator_steps: int = option(16, "steps from noise to an image (flow, conv-flow)", low=1)
    generator_conditional: bool = option(False, "tell the generator the class of each image", "networks")
    solver: str = option(
        "cnn", "convolutional or linear layers, or MODULE:CLASS", "networks", choices=lambda: SOLVERS, group="solver",
        parse=class_of(lambda: SOLVERS, dgr.Solver), metavar="{cnn,mlp,MODULE:CLASS}",
    )  # fmt: skip
    solver_depth: int = option(5, "number of convolutions and the linear layer (cnn)", "networks", low=2, high=32)
    solver_reducing_layers: int = option(
        3, "number of stride-2 convolutions, counted from the last one (cnn)", "networks", low=0, high=5
    )
    solver_channel_size: int = option(
        1024, "channels of the last convolution, halved layer by layer before it (cnn); units (mlp)", "networks", low=1
    )
    solver_blur: float = option(
        0.0, "standard deviation of a Gaussian blur of its inputs, in pixels", "networks", low=0, high=100
    )
    heads: str = option(
        "one", "output layers: one for all, or one per task, which is then known", "networks", choices=("one", "task")
    )
    lr: float = option(1e-4, "learning rate", low=0, above=True, group="optimiser (Adam, for all networks)")
    beta1: float = option(0.5, "decay rate of the gradient's mean", low=0, high=1, below=True)
    beta2: float = option(0.9, "decay rate of the squared gradient's mean", low=0, high=1, below=True)
    weight_decay: float = option(1e-5, "L2 penalty on weights", low=0)
    dtype: str = option("auto", DTYPES, choices=("auto", "float32", "tf32", "bfloat16"), group="device")
    cuda_graphs: bool = option(False, "launch each update as one CUDA graph", None)
    deterministic: bool = option(False, "on a GPU, use only algorithms that repeat bit for bit", None)
    no_gpus: bool = option(False, "use the CPU even if there is a GPU", None)
    number_of_heads: int = 0  # with --heads=task, the number of tasks
    generator_classes: int = 0  # with --generator-conditional, the number of classes

    def optimiser(self, *networks: nn.Module) -> torch.optim.Adam:
        parameters = [parameter for network in networks for parameter in network.parameters()]
        settings = {"betas": (self.beta1, self.beta2), "weight_decay": self.weight_decay}
        # A graph keeps a number as it was when recorded; a tensor, if it is on the device, can be filled in place.
        device = choose_device(gpus=not self.no_gpus) if self.cuda_graphs else None
        rate = torch.tensor(self.lr, device=device) if self.cuda_graphs else self.lr
        adam = torch.optim.Adam(parameters, rate, fused=True, capturable=self.cuda_graphs, **settings)

        def adapt(adam: torch.optim.Adam) -> None:  # the state may come from a run with or without graphs
            for group in adam.param_groups:
                group["capturable"], loaded = self.cuda_graphs, float(group["lr"])
                group["lr"] = rate.fill_(loaded) if self.cuda_graphs else loaded

        adam.register_load_state_dict_post_hook(adapt)
        return adam


NETWORKS = [f.name for f in fields(ScholarOptions) if f.metadata.get("changes") == "networks"]


def step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


class Network(nn.Sequential):
    """A chain of layers. With a `compute_dtype` (torch.bfloat16) it computes in that and returns float32."""

    compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is None:
            return super().forward(x)
        # One autocast region per forward: its cache of cast weights must not outlive an optimiser step.
        with torch.autocast(x.device.type, self.compute_dtype):
            return super().forward(x).float()

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A layer, or a network of some of the layers that computes in the same format."""
        part = super().__getitem__(index)
        if isinstance(index, slice):
            part.compute_dtype = self.compute_dtype
        return part

    def frozen(self) -> "Network":
        """A copy for inference that makes fewer passes over memory.

        Batch normalisation, by now a fixed scale and shift, is folded into the convolution before it, and weights are
        stored in the compute_dtype. Any other layer, subclasses included, may do more than that and is copied as it is;
        so is a network with a forward of its own.
        """
        if type(self).forward is not Network.forward:
            return copy.deepcopy(self).eval().requires_grad_(False)
        layers: list[nn.Module] = []
        for layer in copy.deepcopy(self).eval().requires_grad_(False):
            fixed = type(layer) is nn.BatchNorm2d and layer.track_running_stats
            before = layers[-1] if layers else None
            plain = type(before) in CONVOLUTIONS and not (before.transposed and before.groups > 1)
            if fixed and plain and isinstance(before.weight, nn.Parameter):  # spectral norm's is none
                layers[-1] = fuse_conv_bn_eval(before, layer, transpose=before.transposed)
            else:
                layers.append(layer)
        for layer in layers:
            if type(layer) in (*CONVOLUTIONS, nn.BatchNorm2d, nn.Linear):
                layer.to(self.compute_dtype)
        network = Network(*layers).eval().requires_grad_(False)
        network.compute_dtype = self.compute_dtype
        return network


class WithAdjoint(torch.autograd.Function):
    """A linear function of a tensor, given with its adjoint. Each is the other's derivative, any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[..., Tensor], adjoint: Callable[..., Tensor]) -> Tensor:
        ctx.derivative = adjoint, function
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return WithAdjoint.apply(gradient, *ctx.derivative), None, None


class Products:
    """A convolution as products of matrices: what its window sees at each place, and the weights.

    Subclasses turn images and outputs (n, height, width, channels) and the weight (c_out, c_in, k, k) into batches of
    factors, and back by their adjoints. shape: of what is returned.
    """

    def convolution(self, seen: Tensor, weight: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
        y = self.outputs(seen @ weight.mT, shape)
        return y if bias is None else y.add_(bias)

    def gradient_of_images(self, factors: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        return self.images(factors @ weight, shape)

    def gradient_of_weight(self, factors: Tensor, seen: Tensor, shape: Sequence[int]) -> Tensor:
        return self.weight(factors.mT @ seen, shape)


class Patches(Products):
    """One product: each place sees a patch of the images."""

    def __init__(self, k: int, stride: int, padding: int):
        self.k, self.stride, self.padding = k, stride, padding

    def of_images(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, *[self.padding] * 4))
        seen = x.unfold(1, self.k, self.stride).unfold(2, self.k, self.stride).permute(0, 1, 2, 4, 5, 3)
        return seen.reshape(1, -1, self.k**2 * x.shape[3])  # (1, places, what each sees)

    def images(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        """Patches added up where they were seen, ten times as fast as by PyTorch's derivative of `unfold`."""
        (n, height, width, channels), k, stride, padding = shape, self.k, self.stride, self.padding
        rows, columns = ((side + 2 * padding - k) // stride + 1 for side in (height, width))
        seen = factors.view(n, rows, columns, k, k, channels)
        strips = seen.new_zeros(n, rows, width + 2 * padding, k, channels)
        for j in reversed(range(k)):  # rounding depends on the order
            strips[:, :, j : j + stride * columns : stride] += seen[:, :, :, :, j]
        x = seen.new_zeros(n, height + 2 * padding, width + 2 * padding, channels)
        for i in reversed(range(k)):
            x[:, i : i + stride * rows : stride] += strips[:, :, :, i]
        return x[:, padding : padding + height, padding : padding + width]

    def of_weight(self, weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).reshape(1, len(weight), -1)  # (1, c_out, what it sees)

    def weight(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        c_out, c_in, k, _ = shape
        return factors.view(c_out, k, k, c_in).permute(0, 3, 1, 2)

    def outputs(self, products: Tensor, shape: Sequence[int]) -> Tensor:
        return products.view(shape)

    def of_outputs(self, y: Tensor) -> Tensor:
        return y.reshape(1, -1, y.shape[3])  # (1, places, c_out)

    def convolution(self, seen: Tensor, weight: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
        return F.linear(seen.squeeze(0), weight.squeeze(0), bias).view(shape)


class Direct(Patches):
    """PyTorch's own convolution. With at most 64 places per channel, one product for the gradient of the weight."""

    def of_images(self, x: Tensor) -> Tensor:
        return x[None]  # an axis more, as the factors of other ways have

    def of_weight(self, weight: Tensor) -> Tensor:
        return weight

    def of_outputs(self, y: Tensor) -> Tensor:
        return y[None]

    def convolution(self, seen: Tensor, weight: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
        x = seen[0].permute(0, 3, 1, 2)
        return F.conv2d(x, weight, bias, self.stride, self.padding).permute(0, 2, 3, 1)

    def gradient_of_images(self, factors: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        y = factors[0].permute(0, 3, 1, 2)
        unseen = [(side + 2 * self.padding - self.k) % self.stride for side in shape[1:3]]
        return F.conv_transpose2d(y, weight, None, self.stride, self.padding, unseen).permute(0, 2, 3, 1)

    def gradient_of_weight(self, factors: Tensor, seen: Tensor, shape: Sequence[int]) -> Tensor:
        if factors[0, ..., 0].numel() <= 64 * shape[0]:
            return super().gradient_of_weight(super().of_outputs(factors[0]), super().of_images(seen[0]), shape)
        y, x = factors[0].permute(0, 3, 1, 2), seen[0].permute(0, 3, 1, 2)
        weight = x.new_empty(shape).to(memory_format=torch.channels_last)  # for its shape and layout
        places = [self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], 1
        return torch.ops.aten.convolution_backward(y, x, weight, None, *places, [False, True, False])[1]


class Bilinear(torch.autograd.Function):
    """`Direct` as a function of images and the weight (transposed: of outputs and the weight), with any derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, way: Direct, shape: Sequence[int], transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.way, ctx.transposed = way, transposed
        if transposed:
            return way.gradient_of_images(x[None], weight, shape)
        return way.convolution(x[None], weight, None, shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), way = ctx.saved_tensors, ctx.way
        of_x = Bilinear.apply(gradient, weight, way, x.shape, not ctx.transposed) if ctx.needs_input_grad[0] else None
        outputs, images = (x, gradient) if ctx.transposed else (gradient, x)
        return of_x, way.gradient_of_weight(outputs[None], images[None], weight.shape), None, None, None


class NineProducts(Products):
    """A window of 4 x 4 in steps of 2 as nine products instead of sixteen (Lavin and Gray 2016, arXiv 1509.09308).

    Along one axis, two neighbouring places see d0, d1 and d2 (two values each) through the weights g0 and g1 as
    d0 g0 + d1 g1 and d1 g0 + d2 g1. Three products do for these four: (d0 - d1) g0, d1 (g0 + g1) and (d2 - d1) g1, of
    which the first two are added, and the last two. On both axes nine do for sixteen. See also `Patches`.
    """

    def of_images(self, x: Tensor) -> Tensor:
        nine = three_of_six(three_of_six(F.pad(x, (0, 0, 1, 1, 1, 1)), 1, 3), 3, 4)
        return nine.view(9, -1, 4 * x.shape[3])  # (9, places / 4, 4 c_in)

    def images(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        n, height, width, channels = shape
        nine = factors.view(3, 3, n, height // 4, width // 4, 2, 2, channels)
        return six_of_three(six_of_three(nine, 3, 4), 1, 3)[:, 1:-1, 1:-1]

    def of_weight(self, weight: Tensor) -> Tensor:
        c_out, c_in, *_ = weight.shape
        weight = weight.permute(0, 2, 3, 1).unflatten(2, (2, 2)).unflatten(1, (2, 2)).permute(0, 1, 3, 4, 2, 5)
        return three_of_two(three_of_two(weight, 1), 2).view(9, c_out, 4 * c_in)

    def weight(self, factors: Tensor, shape: Sequence[int]) -> Tensor:
        c_out, c_in, *_ = shape
        nine, weight = factors.view(3, 3, c_out, 2, 2, c_in), factors.new_empty(c_out, 2, 2, 2, 2, c_in)
        two_of_three(two_of_three(nine, 2), 1, weight.permute(0, 1, 3, 4, 2, 5))
        return weight.view(c_out, 4, 4, c_in).permute(0, 3, 1, 2)

    def outputs(self, products: Tensor, shape: Sequence[int]) -> Tensor:
        n, height, width, channels = shape
        nine = products.view(3, 3, n, height // 2, width // 2, channels)
        y = products.new_empty(shape)  # no view, or it could not be changed in place
        two_of_three(two_of_three(nine, 4), 2, y.view(n, height // 2, 2, width // 2, 2, channels))
        return y

    def of_outputs(self, y: Tensor) -> Tensor:
        y = y.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return three_of_two(three_of_two(y, 2), 4).view(9, -1, y.shape[-1])


def three_of_six(x: Tensor, axis: int, pairs: int) -> Tensor:
    """d0 - d1, d1, d2 - d1 along an axis as a new first one: (..., 4 t + 2, ...) to (3, ..., t, ..., 2, ...).

    pairs: which axis, without the new one, is of two then.
    """
    three = torch.stack(x.unfold(axis, 6, 4).movedim(-1, pairs).split(2, pairs))
    three[::2] -= three[1]
    return three


def six_of_three(three: Tensor, axis: int, pairs: int) -> Tensor:
    """The adjoint of `three_of_six`."""
    shape = list(three.shape[1:])
    del shape[pairs]
    shape[axis] = 4 * shape[axis] + 2
    x = three.new_zeros(shape)
    d0, d1, d2 = x.unfold(axis, 6, 4).movedim(-1, pairs).split(2, pairs)
    d0.copy_(three[0])
    torch.sub(three[1], three[0], out=d1).sub_(three[2])
    d2 += three[2]  # all but the last of these are the next d0
    return x


def three_of_two(x: Tensor, axis: int) -> Tensor:
    """g0, g0 + g1, g1 along an axis as a new first one: (..., 2, ...) to (3, ...)."""
    g0, g1 = x.unbind(axis)
    return torch.stack([g0, g0 + g1, g1])


def two_of_three(three: Tensor, axis: int, out: Tensor | None = None) -> Tensor:
    """The adjoint of `three_of_two`."""
    out = None if out is None else out.movedim(axis, 0)
    return torch.add(three[:2], three[1:], out=out).movedim(0, axis)


def computes_in(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes that is given x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def choose_way(
    layer: nn.Module, x: Tensor, height: int, width: int, places: int, channels: int = 64
) -> Products | None:
    """The fastest way for a layer between images (height, width) and so many places in a batch; None: PyTorch's own.

    Rules for a CPU, from measurements (benchmarks/README.md): nine products in float32 from so many channels on, and
    from as many places as the weights' factors cost, too; one product for at most as many places as channels, as
    PyTorch spends most of its time there on rearranging weights and their gradients. AMX, whose products are faster
    still, in bfloat16: one product for more places and for transposed layers, too, and for the gradient of weights.
    """
    if x.device.type != "cpu":
        return None
    (k, _), (stride, _), (padding, _) = layer.kernel_size, layer.stride, layer.padding
    dtype, (c_out, c_in, *_) = computes_in(x), layer.weight.shape
    plain = layer.groups == 1 and layer.dilation == (1, 1) and not any(layer.output_padding)
    window = plain and (layer.kernel_size, layer.stride, layer.padding) == ((4, 4), (2, 2), (1, 1))
    full = dtype == layer.weight.dtype in (torch.float32, torch.float64)
    if window and full and height % 4 == width % 4 == 0 and min(c_out, c_in) >= channels and places >= c_out:
        return NineProducts()
    amx = AMX and dtype == torch.bfloat16
    if layer.transposed and not (amx and window):
        return None
    if places <= (8 if amx and c_out >= 512 else 1) * c_out:
        return Patches(k, stride, padding)
    learns = torch.is_grad_enabled() and layer.weight.requires_grad
    return Direct(k, stride, padding) if amx and learns and layer.bias is None and places <= 16 * c_out else None


def convolve(layer: nn.Module, x: Tensor, way: Products, shape: Sequence[int]) -> Tensor:
    """The outputs of a convolution, or of a transposed one, computed this way; shape: theirs, channels last."""
    x, dtype = x.permute(0, 2, 3, 1), computes_in(x)
    if isinstance(way, Direct):
        with torch.autocast(x.device.type, enabled=False):
            return Bilinear.apply(x.to(dtype), layer.weight.to(dtype), way, shape, layer.transposed).permute(0, 3, 1, 2)
    sides = (way.of_images, way.images), (way.of_outputs, way.outputs)
    (take, untake), (ungive, give) = sides[::-1] if layer.transposed else sides  # each beside its adjoint
    factors = WithAdjoint.apply(x, take, partial(untake, shape=x.shape))
    weight = WithAdjoint.apply(layer.weight, way.of_weight, partial(way.weight, shape=layer.weight.shape))
    if isinstance(way, Patches) and not layer.transposed:
        return way.convolution(factors, weight, layer.bias, shape).permute(0, 3, 1, 2)
    y = WithAdjoint.apply(factors @ (weight if layer.transposed else weight.mT), partial(give, shape=shape), ungive)
    y = y if layer.bias is None else y + layer.bias.to(y.dtype)
    return y.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


class Convolution(nn.Conv2d):
    """A square convolution with zero padding, not grouped, not dilated; on a CPU computed as `choose_way` says."""

    def forward(self, x: Tensor) -> Tensor:
        way, shape = self.way(x)
        return super().forward(x) if way is None else convolve(self, x, way, shape)

    def way(self, x: Tensor, channels: int = 64) -> tuple[Products | None, tuple[int, int, int, int]]:
        """See `choose_way`, and (n, height, width, channels) of outputs."""
        (k, _), (stride, _), (padding, _) = self.kernel_size, self.stride, self.padding
        height, width = ((side + 2 * padding - k) // stride + 1 for side in x.shape[2:])
        way = choose_way(self, x, *x.shape[2:], len(x) * height * width, channels)
        return way, (len(x), height, width, self.out_channels)


class TransposedConvolution(nn.ConvTranspose2d):
    """PyTorch's, on a CPU computed as `choose_way` says."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if x.dim() != 4 or output_size:
            return super().forward(x, output_size)
        n, _, height, width = x.shape
        least = 64 if torch.is_grad_enabled() else 128  # channels: PyTorch's own is slow above all in the gradients
        way = choose_way(self, x, 2 * height, 2 * width, n * height * width, least)
        shape = n, 2 * height, 2 * width, self.out_channels
        return super().forward(x) if way is None else convolve(self, x, way, shape)


CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, Convolution, TransposedConvolution)


class LeakyReLU(nn.LeakyReLU):
    """x where it is positive, slope * x elsewhere, computed as x times a constant, which has no second derivative.

    PyTorch's own has one, full of zeros, that the penalty's backward pass carries through the whole critic.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * x.detach().sign().clamp_(min=self.negative_slope)


class CrossEntropy(torch.autograd.Function):
    """The cross-entropy between images x and the sigmoid of scores s, of the same shape: a sum, in nats.

    Unlike `F.binary_cross_entropy_with_logits`, which it equals, it takes no log1p: on an AMD with AVX512, one takes as
    long as ten logarithms.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(s, x)
        return (s.relu() - s * x - s.abs().sigmoid_().log_()).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        s, x = ctx.saved_tensors
        return (s.sigmoid() - x).mul_(gradient), None


class Sigmoid(nn.Sigmoid):
    """In float32 or wider: in bfloat16 it is exactly 1, without a gradient, from 6.25 on."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


def linear_layers(inputs: int, width: int, outputs: int) -> list[nn.Module]:
    """Linear layers with two hidden ones of `width` units."""
    hidden = [nn.Linear(inputs, width), nn.ReLU(inplace=True), nn.Linear(width, width), nn.ReLU(inplace=True)]
    return [*hidden, nn.Linear(width, outputs)]


class Heads(nn.ModuleList):
    """An output layer per task: features (n, features) to scores (n, heads, classes) of the tasks so far."""

    def __init__(self, layer: nn.Linear, number: int):
        super().__init__([layer, *(nn.Linear(layer.in_features, layer.out_features) for _ in range(number - 1))])
        self.in_use = 1

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(x) for head in list(self)[: self.in_use]], dim=1)

    def begin_task(self, task: int, *, replays: bool) -> None:
        """Use one more head. An old one learns only from replay: Adam would move it even without a gradient."""
        self.in_use = task
        for number, head in enumerate(self, start=1):
            head.requires_grad_(number == task or (replays and number < task))

    def get_extra_state(self) -> int:
        return self.in_use

    def set_extra_state(self, state: int) -> None:
        self.in_use = state


def generator_network(*, z_size: int, channel_size: int, image_channels: int, image_size: int = 32) -> Network:
    """The WGAN's generator: from noise (n, z_size), standard normal, to images. Shapes are those at 32x32.

    It may normalise its batch: only the critic's gradient penalty needs independent samples.
    """
    c, first = channel_size, image_size // 8

    def upsample(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = TransposedConvolution(channels_in, channels_out, 4, stride=2, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]

    return Network(
        nn.Linear(z_size, 8 * c * first * first, bias=False),
        nn.Unflatten(1, (8 * c, first, first)),  # (n, 8c, 4, 4)
        nn.BatchNorm2d(8 * c),
        nn.ReLU(inplace=True),
        *upsample(8 * c, 4 * c),  # (n, 4c, 8, 8)
        *upsample(4 * c, 2 * c),  # (n, 2c, 16, 16)
        *upsample(2 * c, c),  # (n, c, 32, 32)
        nn.Conv2d(c, image_channels, 3, padding=1),
        Sigmoid(),  # (n, image_channels, 32, 32)
    )


def critic_network(*, channel_size: int, image_channels: int, image_size: int = 32, scores: int = 1) -> Network:
    """The WGAN's critic: from images to scores (n, scores). No batch normalisation: each depends on its image alone."""
    c, last = channel_size, image_size // 16

    def downsample(channels_in: int, channels_out: int) -> list[nn.Module]:
        return [Convolution(channels_in, channels_out, 4, stride=2, padding=1), LeakyReLU(0.2)]

    return Network(
        *downsample(image_channels, c),  # (n, c, 16, 16)
        *downsample(c, 2 * c),  # (n, 2c, 8, 8)
        *downsample(2 * c, 4 * c),  # (n, 4c, 4, 4)
        *downsample(4 * c, 8 * c),  # (n, 8c, 2, 2)
        nn.Flatten(),
        nn.Linear(8 * c * last * last, scores),
    )


def critic_gradients(
    critic: Network, real: Tensor, fake: Tensor, y: Tensor | None, penalty_weight: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`gan.critic_loss` in fewer passes: its two values, and the first one's gradient for each parameter.

    critic: convolutions, each with a leaky ReLU, and a linear layer. y: classes (n,) if it is conditional.

    Autograd takes scores and penalty one after the other. Here real, fake and mixed images x^ go through the critic
    together, forward and back. The slopes of the activations at x^ are fixed from then on, so the penalty's gradient
    is that of a score, with t in the place of x^: the direction of D's gradient times what a longer one would cost.
    """
    *layers, _, last = critic
    n = len(real)
    epsilon, dtype = torch.rand(n, 1, 1, 1, dtype=real.dtype), critic.compute_dtype or real.dtype
    x = torch.cat([real, fake, epsilon * real + (1 - epsilon) * fake]).to(dtype)
    passed = []
    for layer, activation in zip(layers[::2], layers[1::2], strict=True):
        way, shape = layer.way(x, channels=16)  # one way or the other, so from fewer on
        window = layer.kernel_size[0], layer.stride[0], layer.padding[0]
        way = way or (Patches(*window) if dtype == real.dtype else Direct(*window))
        seen, weight = way.of_images(x.permute(0, 2, 3, 1)), way.of_weight(layer.weight.to(dtype))
        outputs = way.convolution(seen, weight, layer.bias.to(dtype), shape)
        outputs = F.leaky_relu_(outputs, activation.negative_slope)
        passed.append((way, layer.weight.shape, seen, weight, outputs, activation.negative_slope))
        x = outputs.permute(0, 3, 1, 2)
    features = x.flatten(1)
    of_class = F.one_hot(torch.zeros(n, dtype=torch.int64) if y is None else y, last.out_features).to(real.dtype)
    scores = F.linear(features[: 2 * n], last.weight.to(dtype), last.bias.to(dtype)).to(real.dtype)
    scores = (scores.unflatten(0, (2, n)) * of_class).sum(2).mean(1)
    # The loss's derivative, or for x^ the score itself.
    of_score = torch.cat([-of_class / n, of_class / n, of_class]).to(dtype)

    gradient, back = (of_score @ last.weight.to(dtype)).view(x.shape).permute(0, 2, 3, 1), []
    for number, (way, _, _, weight, outputs, slope) in reversed(list(enumerate(passed))):
        gradient = torch.ops.aten.leaky_relu_backward(gradient, outputs, slope, True)
        factors = way.of_outputs(gradient)
        back.insert(0, (factors, gradient[: 2 * n].sum((0, 1, 2))))
        if number:
            before = passed[number - 1][4].shape
        else:  # beyond the first layer, only x^ counts
            factors, before = factors.chunk(3, dim=1)[2], real.permute(0, 2, 3, 1).shape
        gradient = way.gradient_of_images(factors, weight, before)
    gradient = gradient.to(real.dtype)
    norm = gradient.flatten(1).norm(dim=1)
    t = (gradient * (2 / n * penalty_weight * (norm - 1) / norm.clamp(min=1e-12))[:, None, None, None]).to(dtype)

    gradients = []
    for (way, shape, seen, weight, outputs, slope), (factors, of_bias) in zip(passed, back, strict=True):
        seen_of_t = way.of_images(t)
        seen.chunk(3, dim=1)[2].copy_(seen_of_t)  # maybe in the outputs before, which are done with
        t = way.convolution(seen_of_t, weight, None, (n, *outputs.shape[1:]))
        t = torch.ops.aten.leaky_relu_backward(t, outputs[2 * n :], slope, True)
        gradients += [way.gradient_of_weight(factors, seen, shape), of_bias]
    features[2 * n :] = t.permute(0, 3, 1, 2).flatten(1)
    gradients += [of_score.mT @ features, of_score[: 2 * n].sum(0)]
    distance = scores[0] - scores[1]
    return penalty_weight * (norm - 1).square().mean() - distance, distance, gradients


class WGAN(dgr.Generator):
    """WGAN-GP: a generator that learns against a critic (Gulrajani et al. 2017, Algorithm 1)."""

    captured = ("critic_step", "generator_step")  # methods that --cuda-graphs records

    def __init__(self, image_channels: int, options: ScholarOptions):
        """A conditional critic has a score per class: D(x, y) is linear in features of x (Miyato and Koyama 2018)."""
        z_size, shape = options.generator_z_size, {"image_channels": image_channels, "image_size": options.image_size}
        classes = options.generator_classes
        net = generator_network(z_size=z_size + classes, channel_size=options.generator_g_channel_size, **shape)
        super().__init__(net, z_size, classes)
        self.critic = critic_network(channel_size=options.generator_c_channel_size, scores=classes or 1, **shape)
        self.critic_updates = options.generator_c_updates_per_g_update
        self.penalty_weight = options.generator_lambda
        self.optimiser = options.optimiser(self.net)
        self.critic_optimiser = options.optimiser(self.critic)

    def update(self, inputs: Callable[[], Any]) -> dict[str, Tensor]:
        """`critic_updates` steps of the critic, each on a fresh batch of inputs, then one of the generator."""
        for _ in range(self.critic_updates):
            real, *y = inputs() if self.classes else (inputs(),)
            losses = self.critic_step(real, *y)
        return losses | self.generator_step(len(real))

    def critic_step(self, real: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """Lines 4 to 9 of the algorithm, for real images (n, channels, 32, 32), and their classes if conditional."""
        self.critic.requires_grad_(True)
        if y is not None:
            self.seen[y] = 1
        with torch.no_grad():
            fake = self.net(self.noise(len(real), y))
        if self._in_one_pass(real):
            with torch.no_grad():
                loss, distance, gradients = critic_gradients(self.critic, real, fake, y, self.penalty_weight)
            for parameter, gradient in zip(self.critic.parameters(), gradients, strict=True):
                # In its layout, or fused Adam would mix up what belongs to what.
                same = (gradient.stride(), gradient.dtype) == (parameter.stride(), parameter.dtype)
                parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
            self.critic_optimiser.step()
        else:
            loss, distance = gan.critic_loss(self._critic_of(y), real, fake, penalty_weight=self.penalty_weight)
            step(self.critic_optimiser, loss)
        return {"critic-loss": loss.detach(), "wasserstein": distance}

    def generator_step(self, n: int) -> dict[str, Tensor]:
        """Lines 11 and 12 of the algorithm, for n generated images."""
        self.critic.requires_grad_(False)
        z = self.noise(n)
        y = z[:, self.z_size :].argmax(dim=1) if self.classes else None
        loss = gan.generator_loss(self._critic_of(y), self.net(z))
        step(self.optimiser, loss)
        return {"generator-loss": loss.detach()}

    def _in_one_pass(self, x: Tensor) -> bool:
        """Whether `critic_gradients` can tell what the critic learns: its own layers on a CPU, in bfloat16 with AMX.

        Not from more values than 64 images of 32 x 32 have, as it keeps more of them than autograd does.
        """
        critic = self.critic
        if x.device.type != "cpu" or type(critic) is not Network or x[:, 0].numel() > 2**16:
            return False
        if critic.compute_dtype and not AMX:
            return False
        hooks = any(layer._forward_hooks or layer._forward_pre_hooks for layer in critic.modules())
        known = [*[Convolution, LeakyReLU] * ((len(critic) - 2) // 2), nn.Flatten, nn.Linear]
        names = [f"{i}.{name}" for i in (*range(0, len(critic) - 2, 2), len(critic) - 1) for name in ("weight", "bias")]
        same = list(map(type, critic)) == known and [name for name, _ in critic.named_parameters()] == names
        return same and not hooks

    def _critic_of(self, y: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The critic for images of classes y (n,), or for one such batch after another: scores (n, 1)."""
        if y is None:
            return self.critic
        return lambda x: self.critic(x).gather(1, y.repeat(len(x) // len(y))[:, None])


class VAE(dgr.Generator):
    """A variational autoencoder of linear layers (Kingma and Welling 2014, arXiv 1312.6114).

    Its images are blurred, but it never collapses, it is cheap, and the order of pixels does not matter to it. Encoder
    and decoder have two hidden layers of 16 * generator_g_channel_size units each. The last two layers of `net` are a
    sigmoid and the shape of an image; `learn` takes what comes before them.
    """

    captured = ("learn",)

    def __init__(self, image_channels: int, options: ScholarOptions):
        shape, z_size = (image_channels, options.image_size, options.image_size), options.generator_z_size
        pixels, classes = math.prod(shape), options.generator_classes
        width = 16 * options.generator_g_channel_size
        net = Network(*linear_layers(z_size + classes, width, pixels), Sigmoid(), nn.Unflatten(1, shape))
        super().__init__(net, z_size, classes)
        # To the mean and the log variance of z.
        self.encoder = Network(nn.Flatten(), *linear_layers(pixels + classes, width, 2 * z_size))
        self.optimiser = options.optimiser(self.net, self.encoder)

    def learn(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """One step down the negative evidence lower bound of x (n, channels, 32, 32) in nats per image.

        A conditional VAE bounds log p(x | y): encoder and decoder are told the classes y (n,).
        """
        if y is not None:
            self.seen[y] = 1
        mean, log_variance = self.encoder(x if y is None else self.with_classes(x.flatten(1), y)).chunk(2, dim=1)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        z = z if y is None else self.with_classes(z, y)
        scores, x = self.net[:-2](z), x.clamp(0, 1)  # before the sigmoid; noise replay's x may lie outside [0, 1]
        reconstruction = CrossEntropy.apply(scores, x.flatten(1)) / len(x)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / len(x)
        step(self.optimiser, reconstruction + divergence)
        return {"reconstruction": reconstruction.detach(), "divergence": divergence.detach()}


class Flow(dgr.Generator):
    """Flow matching: noise moves to an image along straight lines (Lipman et al. 2023, arXiv 2210.02747).

    At time t, x_t = (1 - t) z + t x lies between noise z and an image x, and moves on by x - z. The network estimates x
    from x_t, and thus where to move: (x - x_t) / (1 - t) (Liu et al. 2023, arXiv 2209.03003, equations 1 and 2). Its
    layers are linear: it is cheap on a CPU, and the order of pixels does not matter to it.
    """

    captured = ("learn",)
    draws = 2  # noises and times for each image of a batch: their mean is a better gradient

    def __init__(self, image_channels: int, options: ScholarOptions):
        shape = (image_channels, options.image_size, options.image_size)
        net = self.trajectory(shape, options.generator_g_channel_size, options)
        super().__init__(net, net.pixels, options.generator_classes)
        self.optimiser = options.optimiser(self.net)

    def trajectory(self, shape: tuple[int, int, int], size: int, options: ScholarOptions) -> "Trajectory":
        return Trajectory(shape, 32 * size, options.generator_classes, options.generator_steps)

    def learn(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """One step down the cross-entropy of the estimates of x (n, channels, 32, 32), of classes y (n,), per pixel.

        Like the squared error of the velocity, it is least where the estimate is the mean of x; unlike that error, it
        weighs all times t equally, and tells a black pixel from a dark one.
        """
        x = x.clamp(0, 1).repeat(self.draws, 1, 1, 1)  # noise replay's x may lie outside
        t = self.net.time(torch.rand(len(x), 1, dtype=x.dtype, device=x.device))
        if y is not None:
            self.seen[y] = 1
            y = F.one_hot(y.repeat(self.draws), self.classes)
        x_t = (1 - t) * torch.randn_like(x).flatten(1) + t * (2 * x - 1).flatten(1)
        loss = CrossEntropy.apply(self.net.scores(x_t, t, y), x.flatten(1)) / x.numel()
        step(self.optimiser, loss)
        return {"flow-matching": loss.detach()}


class Trajectory(nn.Module):
    """The flow's network: from noise (n, pixels), and classes (n, classes), to images in `steps` steps."""

    frequencies = 16  # of sines and cosines that tell the layers the time
    shift = 1.0  # of `time`

    def __init__(self, shape: tuple[int, int, int], width: int, classes: int, steps: int):
        super().__init__()
        self.shape, self.pixels, self.steps = shape, math.prod(shape), steps
        self.layers = self.make_layers(width, 2 * self.frequencies + classes)
        self.register_buffer("frequency", 1000 ** (1 - torch.arange(self.frequencies) / self.frequencies))

    def make_layers(self, width: int, told: int) -> Network:
        """Layers for x_t (n, pixels) and what else they are told (n, told), one beside the other."""

        def residual() -> Residual:
            return Residual(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

        first, last = nn.Linear(self.pixels + told, width), nn.Linear(width, self.pixels)
        return Network(first, residual(), residual(), nn.SiLU(), last, Sigmoid(), nn.Unflatten(1, self.shape))

    def scores(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The estimate before the sigmoid: (n, pixels)."""
        angle = t * self.frequency
        parts = [x_t, angle.sin(), angle.cos()] + ([] if y is None else [y.to(x_t)])
        return self.layers[:-2](torch.cat(parts, dim=1))

    def estimate(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """What x (n, channels, 32, 32) is on average, given x_t (n, pixels) at t (n, 1) and classes y (n, classes)."""
        return self.layers[-2:](self.scores(x_t, t, y))

    def time(self, u: Any) -> Any:
        """The time t for u in [0, 1], each a number or a tensor; with a shift above 1, most times are early."""
        return u / (u + self.shift * (1 - u))

    def forward(self, noise: Tensor) -> Tensor:
        x, y = noise.split([self.pixels, noise.shape[1] - self.pixels], dim=1)
        for t, after in itertools.pairwise(self.time(i / self.steps) for i in range(self.steps + 1)):
            image = self.estimate(x, x.new_full((len(x), 1), t), y)
            x = x + (2 * image.flatten(1) - 1 - x) * ((after - t) / (1 - t))
        return image


class Residual(nn.Sequential):
    """Layers whose output is added to their input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ConvFlow(Flow):
    """Flow matching with convolutions, for images whose neighbouring pixels belong together; it takes longer."""

    def trajectory(self, shape: tuple[int, int, int], size: int, options: ScholarOptions) -> Trajectory:
        return ConvTrajectory(shape, 2 * size, options.generator_classes, options.generator_steps)


class ConvTrajectory(Trajectory):
    """The same with a U-Net. What will be drawn is decided early: that is where it spends most of its steps."""

    shift = 3.0

    def make_layers(self, width: int, told: int) -> Network:
        return Network(UNet(self.shape, width, told), Sigmoid(), nn.Unflatten(1, self.shape))


class UNet(nn.Module):
    """Convolutions at a half, a quarter and an eighth of an image's sides, and back (Ronneberger et al. 2015).

    From images and what else it is told, (n, pixels + told), to scores (n, pixels). It has `width` channels at a half,
    2 `width` at a quarter, 4 `width` at an eighth (arXiv 1505.04597).
    """

    def __init__(self, shape: tuple[int, int, int], width: int, told: int):
        super().__init__()
        self.shape, self.told = shape, nn.Sequential(nn.Linear(told, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.first = Convolution(4 * shape[0], width, 3, padding=1)
        self.at_half = ToldBlock(width, width)
        self.at_quarter = ToldBlock(width, 2 * width, stride=2)
        self.at_eighth = nn.ModuleList([ToldBlock(2 * width, 4 * width, stride=2), ToldBlock(4 * width, 4 * width)])
        self.back_to_quarter, self.back_to_half = ToldBlock(6 * width, 2 * width), ToldBlock(3 * width, width)
        last = Convolution(width, 4 * shape[0], 3, padding=1)
        self.last = nn.Sequential(nn.GroupNorm(math.gcd(4, width), width), nn.SiLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        x, told = x.split([math.prod(self.shape), self.told[0].in_features], dim=1)
        told, x = self.told(told), F.pixel_unshuffle(x.unflatten(1, self.shape), 2)  # (n, 4 channels, 16, 16)
        half = self.at_half(self.first(x.contiguous(memory_format=torch.channels_last)), told)
        quarter = self.at_quarter(half, told)
        x = quarter
        for block in self.at_eighth:
            x = block(x, told)
        for block, seen in ((self.back_to_quarter, quarter), (self.back_to_half, half)):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), seen], dim=1), told)
        return F.pixel_shuffle(self.last(x), 2).flatten(1)


class ToldBlock(nn.Module):
    """Two convolutions, added to their input; what it is told (n, 64) scales and shifts the values between them."""

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.first = Convolution(channels, width, 3, stride=stride, padding=1)
        self.second = Convolution(width, width, 3, padding=1)
        self.normal, self.told = nn.GroupNorm(math.gcd(4, width), width), nn.Linear(64, 2 * width)
        same = channels == width and stride == 1
        pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()  # PyTorch's gradient of a strided 1 x 1 can crash
        self.shortcut = nn.Identity() if same else nn.Sequential(pool, Convolution(channels, width, 1))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told)[:, :, None, None].chunk(2, dim=1)
        between = F.silu(self.normal(self.first(x)) * (1 + scale) + shift)
        return self.shortcut(x) + self.second(between)


# To add a generator, write a class like these and add a line here: it becomes a choice of --generator.
GENERATORS: dict[str, Callable[[int, ScholarOptions], dgr.Generator]] = {
    "wgan": WGAN, "vae": VAE, "flow": Flow, "conv-flow": ConvFlow,
}  # fmt: skip


class Blur(nn.Module):
    """A Gaussian blur of images (n, channels, size, size) with this standard deviation in pixels.

    Each output is a weighted mean of the pixels there are, so that a blank image stays as it is, borders included.
    """

    def __init__(self, deviation: float, size: int):
        super().__init__()
        apart = torch.arange(size)[:, None] - torch.arange(size)
        self.register_buffer("weight", (-((apart / deviation) ** 2) / 2).softmax(dim=1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x @ self.weight.T


class Classifier(dgr.Solver):
    """A network that learns its answers with Adam. The last layer of a net is linear; it becomes one per head.

    Drawn and real images differ in fine detail, by which a solver could tell old tasks from new ones: with
    --solver-blur, a blur that is meant to hide it is the first layer of its net.
    """

    captured = ("learn",)

    def __init__(self, net: nn.Module, options: ScholarOptions):
        if options.number_of_heads:
            net[-1] = Heads(net[-1], options.number_of_heads)
        if options.solver_blur:
            blur = Blur(options.solver_blur, options.image_size)
            net = Network(blur, *net) if type(net) is Network else nn.Sequential(blur, net)
        super().__init__(net)
        self.optimiser = options.optimiser(self.net)

    def begin_task(self, task: int, *, replays: bool) -> None:
        for layer in self.net.modules():
            if isinstance(layer, Heads):
                layer.begin_task(task, replays=replays)

    def update(self, loss: Callable[..., Tensor], current: dgr.Pairs, replayed: dgr.Pairs | None) -> dict[str, Tensor]:
        return self.learn(loss, *current, *(replayed or ()))

    def learn(self, loss: Callable[..., Tensor], x: Tensor, y: Tensor, *replayed: Tensor) -> dict[str, Tensor]:
        """One step down the gradient of loss((x, y), replayed); replayed is (x', y') or nothing (see `dgr.Pairs`)."""
        value = loss((x, y), replayed or None)
        step(self.optimiser, value)
        return {"loss": value.detach()}


class CNN(Classifier):
    """A convolutional classifier: solver_depth - 1 convolutions and a linear layer.

    Channels double from layer to layer up to solver_channel_size; the last solver_reducing_layers convolutions halve
    height and width.
    """

    def __init__(self, image_channels: int, classes: int, options: ScholarOptions):
        layers: list[nn.Module] = []
        channels, size = image_channels, options.image_size
        for remaining in reversed(range(options.solver_depth - 1)):
            width = options.solver_channel_size // 2**remaining
            stride = 2 if remaining < options.solver_reducing_layers else 1
            convolution = Convolution(channels, width, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels, size = width, -(-size // stride)  # (n, width, size, size)
        super().__init__(Network(*layers, nn.Flatten(), nn.Linear(channels * size * size, classes)), options)


class MLP(Classifier):
    """A classifier of linear layers: two hidden ones of solver_channel_size units.

    It notices blur less than a CNN does, and so takes a VAE's images for what they show.
    """

    def __init__(self, image_channels: int, classes: int, options: ScholarOptions):
        layers = linear_layers(image_channels * options.image_size**2, options.solver_channel_size, classes)
        super().__init__(Network(nn.Flatten(), *layers), options)


# To add a solver, write a class like these and add a line here: it becomes a choice of --solver.
SOLVERS: dict[str, Callable[[int, int, ScholarOptions], dgr.Solver]] = {"cnn": CNN, "mlp": MLP}


def make_scholar(
    image_channels: int, classes: int, options: ScholarOptions, tasks: int = 1, compute_dtype: torch.dtype | None = None
) -> dgr.Scholar:
    """A scholar that has learned nothing yet, on the CPU; tasks: for --heads=task; compute_dtype: see `Network`."""
    counts = {"number_of_heads": tasks} if options.heads == "task" else {}
    counts |= {"generator_classes": classes} if options.generator_conditional else {}
    options = replace(options, **counts)
    generator = GENERATORS[options.generator](image_channels, options)
    scholar = dgr.Scholar(generator, SOLVERS[options.solver](image_channels, classes, options))
    for module in scholar.modules():
        if isinstance(module, Network):
            module.compute_dtype = compute_dtype
            module.to(memory_format=torch.channels_last)  # the faster layout for convolutions
    if options.cuda_graphs:
        for part in (scholar.generator, scholar.solver):
            for name in getattr(part, "captured", ()):
                setattr(part, name, Captured(getattr(part, name)))
    return scholar


NO_CRITIC = ("generator_lambda", "generator_c_channel_size", "generator_c_updates_per_g_update")
IDLE = {
    "wgan": ("generator_steps",),
    "vae": (*NO_CRITIC, "generator_steps"),
    "flow": (*NO_CRITIC, "generator_z_size"),
    "conv-flow": (*NO_CRITIC, "generator_z_size"),
}


def unused(options: ScholarOptions) -> dict[str, str]:
    """The options without effect beside these networks, and what takes it from them."""
    found = dict.fromkeys(IDLE.get(options.generator, ()), f"--generator={options.generator}")
    convolutions = dict.fromkeys(("solver_depth", "solver_reducing_layers"), "--solver=mlp")
    return found | (convolutions if options.solver == "mlp" else {})


def check_networks(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse convolutions that can't be made or can't learn."""
    if options.image_size % 16 and options.generator in ("wgan", "conv-flow"):
        parser.error(f"argument --image-size: --generator={options.generator} needs a multiple of 16, not 28")
    size, depth, reducing = options.solver_channel_size, options.solver_depth, options.solver_reducing_layers
    if options.solver != "cnn":
        return
    if size % (multiple := 2 ** (depth - 2)):
        parser.error(f"argument --solver-channel-size: {size} is not a multiple of {multiple} (--solver-depth {depth})")
    if reducing > depth - 1:
        parser.error(f"argument --solver-reducing-layers: --solver-depth {depth} has only {depth - 1} convolutions")
    if options.batch_size == 1 and options.image_size <= 2**reducing:
        parser.error("argument --batch-size: use at least 2: batch normalisation can't normalise a single value")


def load_scholar(path: Path, options: ScholarOptions) -> tuple[dict[str, Any], dgr.Scholar]:
    """A checkpoint and its scholar, on the device. Raises UserError if the scholar does not fit the options."""
    checkpoint = utils.load_checkpoint(path)
    if "scholar" not in checkpoint:
        raise UserError(f"{path} is the state of an unfinished run, no scholar: finish the run first, with --resume")
    networks = [key for key in NETWORKS if key not in unused(options)]
    trained = utils.plain(ScholarOptions()) | checkpoint["options"]
    if changes := utils.differences(trained, vars(options), networks):
        raise UserError(f"{path} was trained with {changes}: use the flags it was trained with")
    shape = {key: checkpoint[key] for key in ("image_channels", "classes", "tasks")}
    device, dtype = choose(options)
    scholar = make_scholar(**shape, options=options, compute_dtype=dtype)
    with utils.reading(path, f"{path} does not fit the flags"):
        scholar.load_state_dict(checkpoint["scholar"])
    return checkpoint, scholar.to(device)


def inherit(scholar: dgr.Scholar, state: dict[str, Any]) -> None:
    """Load the state of a scholar that may have fewer classes: a wider layer keeps its own weights for the rest.

    Classes come last, in what a solver's layer returns and in what a conditional generator's is given.
    """
    fresh = scholar.state_dict()

    def widen(value: Any, wider: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape == wider.shape:
            return value
        wider = wider.clone()
        wider[tuple(map(slice, value.shape))].copy_(value)
        return wider

    scholar.load_state_dict({name: widen(value, fresh.get(name, value)) for name, value in state.items()})


def among_more(net: nn.Module, more: int) -> nn.Module:
    """A frozen network that scores more classes: the score of those that it does not know is minus infinity."""
    return nn.Sequential(dgr.frozen(net), nn.ConstantPad1d((0, more), -torch.inf)).eval()


def sample_grid(generator: dgr.Generator, n: int, seed: int) -> Tensor:
    """Images (n, channels, 32, 32) from the same noise every time, on every machine and device.

    They have a random stream of their own, so looking does not change what is learned.
    """
    device = next(generator.parameters()).device
    with utils.own_random_numbers(device, seed):  # for generators that draw more than z, too
        return generator.sample(n, torch.randn(n, generator.z_size).to(device))


def choose_device(*, gpus: bool = True) -> torch.device:
    """PyTorch's GPU or other accelerator, else the CPU. Raises UserError if there is a GPU that PyTorch can't use."""
    if gpus:
        with warnings.catch_warnings(action="ignore"):  # which say the same in many lines
            available = torch.accelerator.is_available()
            if problem := unusable_gpu():
                raise UserError(f"{problem} (see pytorch.org/get-started), or run on the CPU with --no-gpus")
        if available:
            return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def check_machine(options: ScholarOptions) -> None:
    """Refuse what this machine can't do; parsing does not, as it also lists runs for other machines."""
    if options.cuda_graphs and choose_device(gpus=not options.no_gpus).type != "cuda":
        why = "not --no-gpus" if options.no_gpus else "and PyTorch finds none that has CUDA"
        raise UserError(f"argument --cuda-graphs: it needs a GPU, {why}; see --help", status=2)


def unusable_gpu() -> str | None:
    """Why PyTorch can't use this machine's NVIDIA GPU, and what to install; None if nothing speaks against it."""
    if torch.version.cuda is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if torch.cuda.is_available():
        (major, minor), built = torch.cuda.get_device_capability(), " ".join(torch.cuda.get_arch_list())
        kernels = [(kind, int(x), int(y)) for kind, x, y in re.findall(r"(sm|compute)_(\d+)(\d)", built)]
        # Code for a GPU runs on later ones of the same generation; compute_ is compiled again for any later one.
        if not kernels or any((kind == "compute" or x == major) and (x, y) <= (major, minor) for kind, x, y in kernels):
            return None
        gpu = f"the GPU ({torch.cuda.get_device_name()}, sm_{major}{minor})"
        return f"PyTorch {torch.__version__} has no code for {gpu}, only for {built}: install a build for another CUDA"
    try:
        command = ["nvidia-smi", "--list-gpus"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        gpu = re.search(r"GPU \d+: (.*?) \(UUID", listed)[1]
        torch.cuda.init()
    except (OSError, subprocess.SubprocessError, TypeError):  # no driver, or one without a GPU
        return None
    except RuntimeError as error:
        why = f"PyTorch {torch.__version__} can't use the GPU ({gpu}): {reason(error)[:300]}"
        return f"{why}: update the driver, or install a build for an older CUDA"
    return None


def set_deterministic(on: bool) -> None:
    """Let PyTorch use only algorithms that repeat bit for bit, or warn where it has none; call it before any GPU is."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on, warn_only=True)


def choose_dtype(dtype: str, device: torch.device, *, cuda_graphs: bool = False) -> torch.dtype | None:
    """What networks compute in: bfloat16, or None for float32 (on a GPU also tf32, which is set here)."""
    gpu = device.type == "cuda"
    if dtype == "auto" and gpu and torch.cuda.is_bf16_supported(including_emulation=False):  # tf32 then is too
        # Its casts are a third more kernels, each of which Python launches unless there are graphs. Not measured yet.
        dtype = "bfloat16" if cuda_graphs else "tf32"
    elif dtype == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # missing in the oldest versions supported
        amd = cpu.get("cpu_name", "").startswith("AMD")  # on Intel, AVX512-BF16 is slower: benchmarks/README.md
        faster = AMX or (amd and cpu.get("avx512_bf16"))  # a rule: a measurement would not always say the same
        dtype = "bfloat16" if device.type == "cpu" and faster else "float32"
    if gpu:
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    elif dtype == "tf32":
        raise UserError("--dtype=tf32 needs a GPU with CUDA, which this run has not: use float32, bfloat16 or auto")
    return torch.bfloat16 if dtype == "bfloat16" else None


def choose(options: ScholarOptions) -> tuple[torch.device, torch.dtype | None]:
    """The device that the options ask for, and what networks compute in there."""
    device = choose_device(gpus=not options.no_gpus)
    return device, choose_dtype(options.dtype, device, cuda_graphs=options.cuda_graphs)


def dtype_name(dtype: torch.dtype | None, device: torch.device) -> str:
    """The name that --dtype has for what `choose_dtype` has chosen."""
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return "bfloat16" if dtype else "tf32" if tf32 else "float32"


def images_at_once(device: torch.device) -> int:
    """How many images to test or draw together: what fits the CPU's cache."""
    return 64 if device.type == "cpu" else 512


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU with its number of threads."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return getattr(torch.get_device_module(device), "get_device_name", lambda _: device.type.upper())(device)


class Captured:
    """A function of tensors as a CUDA graph: hundreds of kernels are launched at once, without waiting for Python.

    function: returns tensors by name, and may change parameters in place. It is recorded after `warm_up` ordinary
    calls, and again when the shape of a tensor or any other argument changes. It must do nothing else.
    """

    warm_up = 3  # ordinary calls in which libraries and optimisers allocate what they keep

    def __init__(self, function: Callable[..., dict[str, Tensor]]):
        self.function = function
        self._signature: tuple[Any, ...] | None = None
        # Warm-up and recording share a stream: autograd and the libraries keep state per stream.
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        signature = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in arguments)
        if signature != self._signature:
            self._signature, self._calls, self._replay = signature, 0, None
        self._calls += 1
        if self._calls <= self.warm_up:
            return self._aside(lambda: self.function(*arguments))
        if self._replay is None:
            self._arguments = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
            self._replay = self._record(lambda: self.function(*self._arguments))
        for kept, given in zip(self._arguments, arguments, strict=True):
            if isinstance(given, Tensor):
                kept.copy_(given)
        return {name: value.clone() for name, value in self._replay().items()}

    def _aside(self, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Work in the stream that will be recorded."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True")  # about optimiser steps that are not recorded
            values = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return values

    def _record(self, work: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        """Record work without doing it. Returns a function that does it; every call overwrites the same tensors."""
        gc.collect()  # a graph freed while another is being recorded would break the recording
        graph = torch.cuda.CUDAGraph()
        # thread_local, or the pinned memory of a data loader's thread would break the recording too.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            values = work()
        return lambda: graph.replay() or values  # `CUDAGraph.replay` returns None


# ------------------------------------------------------------- the classifier whose features measure generators

CLASSIFIER_VERSION = 1  # of network and recipe: with another number, kept classifiers are left alone and made anew


def classifier_network(image_channels: int, size: int, classes: int) -> Network:
    """From images (n, image_channels, size, size) to class scores; its last layer sees 128 features of each."""
    layers: list[nn.Module] = []
    for channels, width in ((image_channels, 16), (16, 32), (32, 64)):
        convolution = Convolution(channels, width, 4, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    features = nn.Linear(64 * (size // 8) ** 2, 128)
    return Network(*layers, nn.Flatten(), features, nn.ReLU(inplace=True), nn.Linear(128, classes))


def learn_classifier(network: nn.Module, splits: Sequence[Any]) -> None:
    """Learn from `data.Split`s: Adam for two passes, in batches of about 128, with as many images of each split."""
    steps = max(100, 2 * sum(map(len, splits)) // 128)
    adam = torch.optim.Adam(network.parameters())
    rates = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=3e-3, total_steps=steps)
    for _ in range(steps):
        pairs = [split.sample(-(-128 // len(splits))) for split in splits]
        x, y = map(torch.cat, zip(*pairs, strict=True))
        step(adam, F.cross_entropy(network(x), y))
        rates.step()


def load_classifier(splits: Sequence[Any], data_dir: Path) -> Network:
    """A classifier of the images of training splits (`data.Split`), all of them together, in evaluation mode.

    It is trained once, from random numbers of its own, and kept in data_dir/classifiers under the checksum of what it
    has learned. A damaged file is made again; where nothing can be written, the classifier is in memory alone.
    """
    splits = list({split.checksum: split for split in splits}.values())  # in a chain, all are the same
    content = hashlib.md5(" ".join(split.checksum for split in splits).encode())
    images, classes = splits[0].images, 1 + max(int(split.labels.max()) for split in splits)
    path = data_dir / "classifiers" / f"v{CLASSIFIER_VERSION}-{content.hexdigest()}"
    with utils.own_random_numbers(images.device, 0):
        network = classifier_network(images.shape[1], images.shape[-1], classes).to(images.device)
        if path.exists():
            try:
                with reading(path, "it does not fit the network"):
                    network.load_state_dict(load_checkpoint(path)["network"])
                return network.frozen()
            except UserError:
                warn(f"{path} is damaged: it is made again")
        print(f"training the classifier that generators are measured with, once: {path}", file=sys.stderr)
        learn_classifier(network, splits)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")  # another run may make the same one now
    try:
        save_checkpoint(unfinished, network=network.state_dict())
        os.replace(unfinished, path)
    except OSError as error:
        warn(f"{path} can't be written ({reason(error)}): each run trains this classifier for itself")
    return network.frozen()
