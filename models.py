"""The generators and solvers that a scholar is made of.

A WGAN-GP or a VAE that learns the inputs, and a classifier (CNN or MLP) that learns the answers, as the interfaces in
`dgr.py` ask for; and the checkpoints that keep them.
"""

import io
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgr
import gan
from utils import Captured, UserError, atomic_write, reading


@dataclass(frozen=True, kw_only=True)
class ScholarOptions:
    """What a scholar is made of; the fields are the options of the same names, which `./main.py --help` explains."""

    generator: str = "wgan"
    generator_lambda: float = 10.0
    generator_z_size: int = 100
    generator_c_channel_size: int = 64
    generator_g_channel_size: int = 64
    generator_c_updates_per_g_update: int = 5
    solver: str = "cnn"
    solver_depth: int = 5
    solver_reducing_layers: int = 3
    solver_channel_size: int = 1024
    lr: float = 1e-4
    beta1: float = 0.5
    beta2: float = 0.9
    weight_decay: float = 1e-5
    cuda_graphs: bool = False

    def optimiser(self, *networks: nn.Module) -> torch.optim.Adam:
        """Adam over all parameters of these networks."""
        parameters = [parameter for network in networks for parameter in network.parameters()]
        how = {"weight_decay": self.weight_decay, "fused": True, "capturable": self.cuda_graphs}
        adam = torch.optim.Adam(parameters, self.lr, (self.beta1, self.beta2), **how)

        def allow_capture(adam: torch.optim.Adam) -> None:  # a state may be of a run without graphs
            for group in adam.param_groups:
                group["capturable"] = self.cuda_graphs

        adam.register_load_state_dict_post_hook(allow_capture)
        return adam


def step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of a loss."""
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def linear_layers(inputs: int, width: int, outputs: int) -> list[nn.Module]:
    """Linear layers with two hidden ones of `width` units."""
    return [
        *(nn.Linear(inputs, width), nn.ReLU(inplace=True)),
        *(nn.Linear(width, width), nn.ReLU(inplace=True)),
        nn.Linear(width, outputs),
    ]


# -------------------------------------------------------------------------------------------------- generators


class WGAN(dgr.Generator):
    """WGAN-GP: a generator that learns against a critic (Gulrajani et al. 2017, Algorithm 1)."""

    functions_of_tensors = ("critic_step", "generator_step")  # what --cuda-graphs captures

    def __init__(self, image_channels: int, options: ScholarOptions):
        net = gan.generator_network(
            z_size=options.generator_z_size,
            channel_size=options.generator_g_channel_size,
            image_channels=image_channels,
        )
        super().__init__(net, options.generator_z_size)
        self.critic = gan.critic_network(channel_size=options.generator_c_channel_size, image_channels=image_channels)
        self.critic_updates = options.generator_c_updates_per_g_update
        self.penalty_weight = options.generator_lambda
        self.optimiser = options.optimiser(self.net)
        self.critic_optimiser = options.optimiser(self.critic)

    def update(self, inputs: Callable[[], Tensor]) -> dict[str, Tensor]:
        """`critic_updates` steps of the critic, each on a fresh batch of inputs, then one of the generator."""
        for _ in range(self.critic_updates):
            real = inputs()
            losses = self.critic_step(real)
        return losses | self.generator_step(len(real))

    def critic_step(self, real: Tensor) -> dict[str, Tensor]:
        """Lines 4 to 9 of the algorithm, for real images (n, channels, 32, 32)."""
        self.critic.requires_grad_(True)
        with torch.no_grad():
            fake = self.net(self.noise(len(real)))
        loss, distance = gan.critic_loss(self.critic, real, fake, penalty_weight=self.penalty_weight)
        step(self.critic_optimiser, loss)
        return {"critic-loss": loss.detach(), "wasserstein": distance}

    def generator_step(self, n: int) -> dict[str, Tensor]:
        """Lines 11 and 12, for n generated images."""
        self.critic.requires_grad_(False)
        loss = gan.generator_loss(self.critic, self.net(self.noise(n)))
        step(self.optimiser, loss)
        return {"generator-loss": loss.detach()}


class VAE(dgr.Generator):
    """A variational autoencoder of linear layers (Kingma and Welling 2014, arXiv 1312.6114).

    Blurred but never collapsed, and cheap: pixels in any order are the same to it. Two hidden layers of
    16 * generator_g_channel_size units on either side.
    """

    functions_of_tensors = ("learn",)

    def __init__(self, image_channels: int, options: ScholarOptions):
        pixels, z_size = image_channels * gan.IMAGE_SIZE**2, options.generator_z_size
        width = 16 * options.generator_g_channel_size
        to_image = nn.Unflatten(1, (image_channels, gan.IMAGE_SIZE, gan.IMAGE_SIZE))
        super().__init__(gan.Network(*linear_layers(z_size, width, pixels), gan.Sigmoid(), to_image), z_size)
        # To mean and logarithm of the variance of z.
        self.encoder = gan.Network(nn.Flatten(), *linear_layers(pixels, width, 2 * z_size))
        self.optimiser = options.optimiser(self.net, self.encoder)

    def update(self, inputs: Callable[[], Tensor]) -> dict[str, Tensor]:
        """One step down the negative evidence lower bound, in nats per image (equation 10)."""
        return self.learn(inputs())

    def learn(self, x: Tensor) -> dict[str, Tensor]:
        """The same for the images x (n, channels, 32, 32)."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + (log_variance / 2).exp() * self.noise(len(x))
        # Noise replay's x may lie outside [0, 1]; weights that are lost give NaN, which is the task loop's to report.
        p = self.net(z).nan_to_num(0.5)
        reconstruction = F.binary_cross_entropy(p, x.clamp(0, 1), reduction="sum") / len(x)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / len(x)
        step(self.optimiser, reconstruction + divergence)
        return {"reconstruction": reconstruction.detach(), "divergence": divergence.detach()}


# A new generator is one class like these and one line here; it becomes a choice of --generator.
GENERATORS: dict[str, Callable[[int, ScholarOptions], dgr.Generator]] = {"wgan": WGAN, "vae": VAE}


# ----------------------------------------------------------------------------------------------------- solvers


Loss = Callable[[dgr.Pairs, dgr.Pairs], Tensor]  # of current and replayed pairs


class Classifier(dgr.Solver):
    """A network that learns its answers with Adam."""

    functions_of_tensors = ("learn",)

    def __init__(self, net: nn.Module, options: ScholarOptions):
        super().__init__(net)
        self.optimiser = options.optimiser(self.net)

    def update(self, loss: Loss, current: dgr.Pairs, replayed: dgr.Pairs) -> dict[str, Tensor]:
        """One step down the gradient of loss(current, replayed)."""
        return self.learn(loss, *current, *replayed)

    def learn(self, loss: Loss, x: Tensor, y: Tensor, x_replayed: Tensor, y_replayed: Tensor) -> dict[str, Tensor]:
        """The same as a function of tensors; shapes: see `dgr.Pairs`."""
        value = loss((x, y), (x_replayed, y_replayed))
        step(self.optimiser, value)
        return {"loss": value.detach()}


class CNN(Classifier):
    """A convolutional classifier for 32x32 images.

    solver_depth - 1 convolutions and a linear layer. Channels double from layer to layer up to solver_channel_size;
    the last solver_reducing_layers convolutions halve height and width.
    """

    def __init__(self, image_channels: int, classes: int, options: ScholarOptions):
        layers: list[nn.Module] = []
        channels, size = image_channels, gan.IMAGE_SIZE
        for remaining in reversed(range(options.solver_depth - 1)):
            width = options.solver_channel_size // 2**remaining
            stride = 2 if remaining < options.solver_reducing_layers else 1
            layers += [
                gan.Convolution(channels, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels, size = width, size // stride  # (n, width, size, size)
        super().__init__(gan.Network(*layers, nn.Flatten(), nn.Linear(channels * size * size, classes)), options)


class MLP(Classifier):
    """A classifier of linear layers: two hidden ones of solver_channel_size units.

    It tells blurred images from sharp ones less easily than a CNN, and takes samples of a VAE for what they show.
    """

    def __init__(self, image_channels: int, classes: int, options: ScholarOptions):
        layers = linear_layers(image_channels * gan.IMAGE_SIZE**2, options.solver_channel_size, classes)
        super().__init__(gan.Network(nn.Flatten(), *layers), options)


# A new solver is one class like these and one line here; it becomes a choice of --solver.
SOLVERS: dict[str, Callable[[int, int, ScholarOptions], dgr.Solver]] = {"cnn": CNN, "mlp": MLP}


def make_scholar(
    image_channels: int, classes: int, options: ScholarOptions, *, compute_dtype: torch.dtype | None = None
) -> dgr.Scholar:
    """A scholar that has learned nothing yet; compute_dtype: see `gan.Network`."""
    generator = GENERATORS[options.generator](image_channels, options)
    scholar = dgr.Scholar(generator, SOLVERS[options.solver](image_channels, classes, options))
    for module in scholar.modules():
        if isinstance(module, gan.Network):
            module.compute_dtype = compute_dtype
            module.to(memory_format=torch.channels_last)  # the convolutions' faster layout
    if options.cuda_graphs:
        for part in (scholar.generator, scholar.solver):
            for name in getattr(part, "functions_of_tensors", ()):
                setattr(part, name, Captured(getattr(part, name)))
    return scholar


# ------------------------------------------------------------------------------------------------- checkpoints

CHECKPOINT_FORMAT = 5


def save_checkpoint(path: Path, *, keep_previous: bool = False, **content: Any) -> None:
    """Write tensors and plain values; the file appears whole or not at all, and the one before it stays until then."""
    buffer = io.BytesIO()  # torch's own writer turns a full disk into an error without a reason
    torch.save({"format": CHECKPOINT_FORMAT, **content}, buffer)
    buffer.seek(0)
    with reading(path, f"{path} can't hold what a get_extra_state gives: neither a tensor nor a plain value"):
        torch.load(buffer, map_location="meta", weights_only=True)  # its structure alone

    def write() -> None:
        with atomic_write(path, "wb", keep_as=previous(path) if keep_previous else None) as file:
            file.write(buffer.getbuffer())

    try:
        write()
    except FileNotFoundError:  # the directory was taken away in this very moment: it is made again
        write()


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.name}.previous")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, on the CPU, without executing anything in it."""
    if not path.exists():
        raise UserError(f"no scholar at {path}: train one first, with --train and the same flags")
    with reading(path, f"{path} is damaged or not a checkpoint of this program; only --train can make it again"):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on files of other programs
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = int(checkpoint["format"])
    if found != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: format {found} is not this program's ({CHECKPOINT_FORMAT})")
    return checkpoint
