"""The generator and the solver that a scholar is made of.

A WGAN-GP that learns the inputs, and a convolutional classifier that learns the answers, as the interfaces in `dgr.py`
ask for; and the checkpoints that keep them.
"""

import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dgr
import gan
from utils import UserError, atomic_write, reason


@dataclass(frozen=True, kw_only=True)
class AdamOptions:
    """Options of the Adam optimisers of generator, critic and solver."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float

    def optimiser(self, network: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(
            network.parameters(), lr=self.lr, betas=(self.beta1, self.beta2), weight_decay=self.weight_decay
        )


class WGAN(dgr.Generator):
    """WGAN-GP: a generator that learns against a critic (Gulrajani et al. 2017, Algorithm 1)."""

    def __init__(
        self,
        *,
        image_channels: int,
        z_size: int,
        channel_size: int,
        critic_channel_size: int,
        critic_updates: int,
        penalty_weight: float,
        adam: AdamOptions,
    ):
        super().__init__(
            gan.generator_network(z_size=z_size, channel_size=channel_size, image_channels=image_channels), z_size
        )
        self.critic = gan.critic_network(channel_size=critic_channel_size, image_channels=image_channels)
        self.critic_updates = critic_updates
        self.penalty_weight = penalty_weight
        self.optimiser = adam.optimiser(self.net)
        self.critic_optimiser = adam.optimiser(self.critic)

    def update(self, inputs: Callable[[], Tensor]) -> dict[str, Tensor]:
        """`critic_updates` steps of the critic, each on a fresh batch of inputs, then one of the generator."""
        self.critic.requires_grad_(True)
        for _ in range(self.critic_updates):
            real = inputs()
            with torch.no_grad():
                fake = self.net(self.noise(len(real)))
            loss, distance = gan.critic_loss(self.critic, real, fake, penalty_weight=self.penalty_weight)
            self.critic_optimiser.zero_grad()
            loss.backward()
            self.critic_optimiser.step()

        self.critic.requires_grad_(False)
        generator_loss = gan.generator_loss(self.critic, self.net(self.noise(len(real))))
        self.optimiser.zero_grad()
        generator_loss.backward()
        self.optimiser.step()
        return {"critic-loss": loss.detach(), "generator-loss": generator_loss.detach(), "wasserstein": distance}


class CNN(dgr.Solver):
    """A convolutional classifier for 32x32 images.

    depth - 1 convolutions and a linear layer. Channels double from layer to layer up to channel_size; the last
    reducing_layers convolutions halve height and width.
    """

    def __init__(
        self,
        *,
        image_channels: int,
        classes: int,
        depth: int,
        reducing_layers: int,
        channel_size: int,
        adam: AdamOptions,
    ):
        layers: list[nn.Module] = []
        channels, size = image_channels, gan.IMAGE_SIZE
        for remaining in reversed(range(depth - 1)):
            width = channel_size // 2**remaining
            stride = 2 if remaining < reducing_layers else 1
            layers += [
                nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels, size = width, size // stride  # (n, width, size, size)
        super().__init__(gan.Network(*layers, nn.Flatten(), nn.Linear(channels * size * size, classes)))
        self.optimiser = adam.optimiser(self.net)

    def update(self, loss: Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()


# ------------------------------------------------------------------------------------------------- checkpoints

CHECKPOINT_FORMAT = 1


def save_scholar(path: Path, scholar: dgr.Scholar, **description: Any) -> None:
    """Write a scholar and what it takes to build it again; the file appears whole or not at all."""
    with atomic_write(path, "wb") as file:
        torch.save({"format": CHECKPOINT_FORMAT, **description, "scholar": scholar.state_dict()}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, on the CPU, without executing anything in it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on files of other programs
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            raise UserError(f"{path}: format {checkpoint['format']} is not this program's ({CHECKPOINT_FORMAT})")
        return checkpoint
    except FileNotFoundError as error:
        raise UserError(f"no scholar at {path}: train one first, with --train and the same flags") from error
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(f"{path} is damaged or not a checkpoint of this program: train again, with --train") from error


def restore_scholar(path: Path, scholar: dgr.Scholar, checkpoint: dict[str, Any]) -> None:
    """Give a scholar the weights of a checkpoint."""
    try:
        scholar.load_state_dict(checkpoint["scholar"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not fit the flags: {reason(error)[:200]}") from error
