#!/usr/bin/env python3
"""What each choice of this implementation is worth: one thing done another way at a time.

    benchmarks/ablations.py                         all variations, three seeds; finished runs are skipped
    benchmarks/ablations.py "z times 0.1" --seeds 0 1
    benchmarks/ablations.py --levers                what might bring generative replay closer to exact replay

A variation is what the 2017 repository does (docs/differences.md), a flag, or more or less of something, on permuted
MNIST, smaller than the quick recipe. A lever is something that the literature or users suggest, on split MNIST with a
small VAE and MLP (some: WGAN-GP and CNN), where exact replay is ahead; precision is that on held-out training images,
as levers are chosen by it. Each run takes minutes on one core. Runs go to results/ablations (levers), and their
precisions to results/ablations.json (levers.json), beside those of earlier calls with the same flags and seeds.
"""

import contextlib
import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dgr
import gan
import main
import models
import train
import utils
import visual

FLAGS = [
    "--train",
    "--quick",
    *("--generator-c-channel-size=8", "--generator-g-channel-size=8", "--solver-channel-size=128"),
    *("--batch-size=32", "--generator-iterations=300", "--lr-schedule=constant", "--eval-log-interval=300"),
]

# --------------------------------------------------------------------------------------- the other ways


def two_forwards(
    solver: dgr.Solver,
    current: dgr.Pairs,
    replayed: dgr.Pairs | None,
    r: float,
    temperature: float = 1.0,
    penalty: None = None,
) -> Tensor:
    """Equation 1 with a forward pass for each kind of images: batch normalisation normalises them separately."""
    x, y = current
    loss = dgr.loss(solver(x), y, temperature)
    if replayed is None:
        return loss
    x_replayed, y_replayed = replayed
    return r * loss + (1 - r) * dgr.loss(solver(x_replayed), y_replayed, temperature)


@contextlib.contextmanager
def evaluating_in_training_mode(network: nn.Module) -> Iterator[None]:
    """Batch normalisation uses the statistics of the current batch, and updates the running ones."""
    with torch.no_grad():
        yield


def frozen_in_training_mode(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).train().requires_grad_(False)


def penalty_of_pixels(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The norm over the channels of each pixel, instead of over all values of an image."""
    epsilon = torch.rand(len(real), 1, 1, 1, device=real.device)
    x_hat = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


def one_batch_for_all(update: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A generator update in which every critic update sees the same batch."""

    def updating(self: models.WGAN, inputs: Callable[[], Tensor]) -> dict[str, Tensor]:
        x = inputs()
        return update(self, lambda: x)

    return updating


def two_losses(
    generator: models.WGAN,
    current: dgr.Source,
    replay: dgr.Source | None,
    *,
    r: float,
    iterations: int,
    batch_size: int,
) -> Iterator[dict[str, Tensor]]:
    """One critic loss for current images and one for replayed ones, weighted r and 1 - r, instead of one for a mix."""
    generator.train()
    sources = [(current, 1.0)] if replay is None else [(current, r), (replay, 1 - r)]
    for _ in range(iterations):
        for _ in range(generator.critic_updates):
            generator.critic.requires_grad_(True)
            losses = []
            for source, weight in sources:
                with torch.no_grad():
                    fake = generator.net(generator.noise(batch_size))
                real = source.inputs(batch_size)
                loss, _ = gan.critic_loss(generator.critic, real, fake, penalty_weight=generator.penalty_weight)
                losses.append(weight * loss)
            models.step(generator.critic_optimiser, sum(losses))
        yield generator.generator_step(batch_size)


def critic_of_2017(*, channel_size: int, image_channels: int, image_size: int, scores: int) -> models.Network:
    """The last convolution has stride 1, and the head reads 64 c values where an image has 72 c, so rows mix images.

    It needs batches of a multiple of 8, and images of 32 x 32.
    """
    c = channel_size
    layers: list[nn.Module] = []
    for channels_in, channels_out, stride in (
        (image_channels, c, 2),
        (c, 2 * c, 2),
        (2 * c, 4 * c, 2),
        (4 * c, 8 * c, 1),
    ):
        layers += [models.Convolution(channels_in, channels_out, 4, stride=stride, padding=1)]
        layers += [models.LeakyReLU(0.01)]
    mix = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 64 * c)))
    return models.Network(*layers, mix, nn.Linear(64 * c, 1))


def tenth(noise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, n, y=None: 0.1 * noise(self, n, y)


def standard_normal(self: dgr.NoiseReplay, n: int) -> Tensor:
    return torch.randn(n, *self._shape, device=self._deviation_and_mean.device)


def bare_first_convolution(initialise: Callable[..., None]) -> Callable[..., None]:
    """A solver's `__init__` without normalisation and ReLU after the first convolution."""

    def initialising(self: models.CNN, image_channels: int, classes: int, options: models.ScholarOptions) -> None:
        initialise(self, image_channels, classes, options)
        del self.net[1:3]
        self.optimiser = options.optimiser(self.net)

    return initialising


def small_normal_weights(initialise: Callable[..., None]) -> Callable[..., None]:
    """A WGAN-GP's `__init__` with normal weights of standard deviation 0.02 and zero biases."""

    def initialising(self: models.WGAN, image_channels: int, options: models.ScholarOptions) -> None:
        initialise(self, image_channels, options)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    return initialising


@dataclass(frozen=True)
class Variation:
    """One thing done another way: more flags, options times a factor, or functions (owner, name) replaced."""

    flags: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    instead: dict[tuple[Any, str], Any] = field(default_factory=dict)


WIDTHS = ("generator_c_channel_size", "generator_g_channel_size", "solver_channel_size")

VARIATIONS = {
    "baseline": Variation(),
    "hard targets": Variation(["--replay-targets=hard"]),
    "r = 0.3": Variation(["--importance-of-new-task=0.3"]),
    "two forwards of the solver": Variation(instead={(dgr, "solver_loss"): two_forwards}),
    "training mode throughout": Variation(
        instead={(dgr, "evaluating"): evaluating_in_training_mode, (dgr, "frozen"): frozen_in_training_mode}
    ),
    "one batch for five critic updates": Variation(
        instead={(models.WGAN, "update"): one_batch_for_all(models.WGAN.update)}
    ),
    "norm over channels": Variation(
        instead={(gan, "gradient_penalty"): penalty_of_pixels, (models.WGAN, "_in_one_pass"): lambda *_: False}
    ),
    "critic of 2017": Variation(instead={(models, "critic_network"): critic_of_2017}),
    "z times 0.1": Variation(instead={(dgr.Generator, "noise"): tenth(dgr.Generator.noise)}),
    "two losses instead of the mix": Variation(instead={(dgr, "learn_generator"): two_losses}),
    "bare first convolution of the solver": Variation(
        instead={(models.CNN, "__init__"): bare_first_convolution(models.CNN.__init__)}
    ),
    "small normal weights of the WGAN-GP": Variation(
        instead={(models.WGAN, "__init__"): small_normal_weights(models.WGAN.__init__)}
    ),
    "width times 2": Variation(times=dict.fromkeys(WIDTHS, 2)),
    "learning rate times 3": Variation(times={"lr": 3}),
    "learning rate times 0.3": Variation(times={"lr": 0.3}),
    "learning rate down to 0": Variation(["--lr-schedule=linear"]),
    "generator iterations times 3": Variation(times={"generator_iterations": 3}),
    "solver iterations times 3": Variation(times={"solver_iterations": 3}),
    "exact replay": Variation(["--replay-mode=exact-replay"]),
    "exact replay, solver iterations times 3": Variation(
        ["--replay-mode=exact-replay"], times={"solver_iterations": 3}
    ),
    "exact replay, learning rate down to 0": Variation(["--replay-mode=exact-replay", "--lr-schedule=linear"]),
    "noise replay": Variation(["--replay-mode=noise-replay"]),
    "noise replay, standard normal": Variation(
        ["--replay-mode=noise-replay"], instead={(dgr.NoiseReplay, "draw"): standard_normal}
    ),
}

# -------------------------------------------------------------------------------------------------- levers

LEVER_FLAGS = [
    *("--train", "--recipe=vae", "--experiment=split-mnist", "--validation=0.1", "--lr-schedule=linear"),
    *(
        "--generator-iterations=600",
        "--solver-iterations=300",
        "--generator-z-size=32",
        "--generator-g-channel-size=25",
    ),
    *("--solver-channel-size=400", "--eval-log-interval=300"),
]


def averaging(
    part: type, remembered: Callable[[nn.Module], nn.Module], decay: float, step: str = "learn"
) -> dict[tuple[Any, str], Any]:
    """A generator or solver with a moving average of its weights, which is what is remembered.

    step: its method that changes them.
    """
    initialise, learn = part.__init__, getattr(part, step)

    def initialising(self: Any, *arguments: Any) -> None:
        initialise(self, *arguments)
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def learning(self: Any, *arguments: Any) -> dict[str, Tensor]:
        losses = learn(self, *arguments)
        self.average.update_parameters(self.net)
        return losses

    return {
        (part, "__init__"): initialising,
        (part, step): learning,
        (part, "remember"): remembered,
    }


def averaged_generator(generator: dgr.Generator) -> dgr.Generator:
    return dgr.Generator(dgr.frozen(generator.average.module), generator.z_size)


def averaged_solver(solver: dgr.Solver) -> dgr.Solver:
    return dgr.Solver(dgr.frozen(solver.average.module)).eval()


def noisy_critic(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of WGAN-GP whose critic sees all images through noise (Sønderby et al. 2017, arXiv 1610.04490)."""
    return lambda critic, *images, **settings: loss(
        lambda x: critic(x + 0.1 * torch.randn_like(x)), *images, **settings
    )


def beginning_anew(learn_task: Callable[[train.Training], None]) -> Callable[[train.Training], None]:
    """A task begins with optimisers that have forgotten the last one."""

    def learning(self: train.Training) -> None:
        for phase, done in self.done.items():
            for optimiser in train.optimisers(getattr(self.scholar, phase)).values() if done == 0 else ():
                optimiser.state.clear()
        learn_task(self)

    return learning


def more_replay(learn: Callable[..., Any]) -> Callable[..., Any]:
    """As many replayed images for each task behind as current ones (r is 1/i)."""

    def learning(
        solver: dgr.Solver, current: dgr.Source, replay: dgr.Source | None, *, r: float, **settings: Any
    ) -> Any:
        more = replay and SimpleNamespace(sample=lambda n: replay.sample(n * (round(1 / r) - 1)))
        return learn(solver, current, more, r=r, **settings)

    return learning


def confident_half(self: dgr.GenerativeReplay, n: int) -> Tensor:
    """Of twice as many images, those of which the old solver is surest; the new generator learns from them, too."""
    x = self.old_scholar.generator.sample(2 * n)
    sure = self.old_scholar.solver.answer_softly(x, 1.0).amax(dim=1)
    return x[sure.topk(n).indices[torch.randperm(n)]]


def mixing(learn: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Mixup (Zhang et al. 2018, arXiv 1710.09412) within current and within replayed images.

    Two images are mixed, and so are the losses of their two answers: classes stay classes, and soft targets soft.
    """

    def learning(self: models.MLP, loss: Any, x: Tensor, y: Tensor, *replayed: Tensor) -> dict[str, Tensor]:
        share = float(torch.distributions.Beta(0.2, 0.2).sample())
        pairs = [(x, y), *([replayed] if replayed else [])]
        orders = [torch.randperm(len(images)) for images, _ in pairs]
        mixed = [share * images + (1 - share) * images[order] for (images, _), order in zip(pairs, orders, strict=True)]
        others = [answers[order] for (_, answers), order in zip(pairs, orders, strict=True)]

        def mixed_loss(current: dgr.Pairs, replayed: dgr.Pairs | None) -> Tensor:
            other = [(images, answers) for (images, _), answers in zip((current, replayed), others, strict=False)]
            return share * loss(current, replayed) + (1 - share) * loss(other[0], other[1] if replayed else None)

        return learn(self, mixed_loss, mixed[0], y, *((mixed[1], replayed[1]) if replayed else ()))

    return learning


def noisy_inputs(deviation: float) -> dict[tuple[Any, str], Any]:
    """The solver learns from real and replayed images with Gaussian noise on them, and answers clean ones."""
    return {(models.Classifier, "varied"): lambda self, x: x + deviation * torch.randn_like(x)}


def with_dropout(initialise: Callable[..., None]) -> Callable[..., None]:
    """An MLP's `__init__` with a fifth of the units of both hidden layers dropped."""

    def initialising(self: models.MLP, image_channels: int, classes: int, options: models.ScholarOptions) -> None:
        initialise(self, image_channels, classes, options)
        for at in (5, 3):  # after the ReLUs
            self.net.insert(at, nn.Dropout(0.2))

    return initialising


SMALL_WGAN = [
    *("--generator=wgan", "--solver=cnn", "--image-size=16", "--batch-size=64"),
    *("--generator-c-channel-size=16", "--generator-g-channel-size=16", "--generator-c-updates-per-g-update=3"),
    "--solver-channel-size=128",
]
HALF = {"generator_iterations": 0.5}  # of those of the VAE
EXACT, CONSTANT = "--replay-mode=exact-replay", "--lr-schedule=constant"
AVERAGED_GENERATOR = averaging(models.VAE, averaged_generator, 0.99)
AVERAGED_SOLVER = averaging(models.Classifier, averaged_solver, 0.99)
MIXUP = {(models.Classifier, "learn"): mixing(models.Classifier.learn)}
DROPOUT = {(models.MLP, "__init__"): with_dropout(models.MLP.__init__)}
AVERAGED_WGAN = averaging(models.WGAN, averaged_generator, 0.99, "generator_step")
NOISY_CRITIC = {(gan, name): noisy_critic(getattr(gan, name)) for name in ("critic_loss", "generator_loss")}
NOISY_CRITIC[models.WGAN, "_in_one_pass"] = lambda *_: False
NEW_ADAM = {(train.Training, "_learn_task"): beginning_anew(train.Training._learn_task)}

LEVERS = {
    "no lever": Variation(),
    "no lever, exact replay": Variation([EXACT]),
    "average of the generator's weights": Variation(instead=AVERAGED_GENERATOR),
    "average of the solver's weights": Variation(instead=AVERAGED_SOLVER),
    "constant learning rate": Variation([CONSTANT]),
    "constant learning rate, average of the generator's weights": Variation([CONSTANT], instead=AVERAGED_GENERATOR),
    "constant learning rate, average of the solver's weights": Variation([CONSTANT], instead=AVERAGED_SOLVER),
    "constant learning rate, exact replay": Variation([CONSTANT, EXACT]),
    "Adam begins each task anew": Variation(instead=NEW_ADAM),
    "generator told the classes": Variation(["--generator-conditional"]),
    "generator told the classes, which are the labels": Variation(["--generator-conditional", "--replay-targets=own"]),
    "as much replay for each task behind": Variation(instead={(dgr, "learn_solver"): more_replay(dgr.learn_solver)}),
    "three times the generator's iterations": Variation(times={"generator_iterations": 3}),
    "replay that the old solver is sure of": Variation(instead={(dgr.GenerativeReplay, "draw"): confident_half}),
    "temperature 1": Variation(["--temperature=1"]),
    "temperature 8": Variation(["--temperature=8"]),
    "z of 16": Variation(["--generator-z-size=16"]),
    "z of 100": Variation(["--generator-z-size=100"]),
    "solver noise 0.1": Variation(instead=noisy_inputs(0.1)),
    "solver noise 0.1, exact replay": Variation([EXACT], instead=noisy_inputs(0.1)),
    "solver noise 0.2": Variation(instead=noisy_inputs(0.2)),
    "solver noise 0.2, exact replay": Variation([EXACT], instead=noisy_inputs(0.2)),
    "dropout": Variation(instead=DROPOUT),
    "dropout, exact replay": Variation([EXACT], instead=DROPOUT),
    "mixup": Variation(instead=MIXUP),
    "mixup, exact replay": Variation([EXACT], instead=MIXUP),
    "WGAN-GP and CNN": Variation(SMALL_WGAN, times=HALF),
    "WGAN-GP and CNN, exact replay": Variation([*SMALL_WGAN, EXACT]),
    "WGAN-GP and CNN, average of the generator's weights": Variation(SMALL_WGAN, times=HALF, instead=AVERAGED_WGAN),
    "WGAN-GP and CNN, generator told the classes": Variation([*SMALL_WGAN, "--generator-conditional"], times=HALF),
    "WGAN-GP and CNN, noise of 0.1 on the critic's inputs": Variation(SMALL_WGAN, times=HALF, instead=NOISY_CRITIC),
    "WGAN-GP and CNN, solver blur 0.75": Variation([*SMALL_WGAN, "--solver-blur=0.75"], times=HALF),
    "WGAN-GP and CNN, solver blur 0.75, exact replay": Variation([*SMALL_WGAN, "--solver-blur=0.75", EXACT]),
    "WGAN-GP and CNN, solver distortion 1": Variation([*SMALL_WGAN, "--solver-distortion=1"], times=HALF),
    "WGAN-GP and CNN, solver distortion 1, exact replay": Variation([*SMALL_WGAN, "--solver-distortion=1", EXACT]),
    "WGAN-GP and CNN, three times the generator's iterations": Variation(
        SMALL_WGAN, times={"generator_iterations": 3 * 0.5}
    ),
}

# ------------------------------------------------------------------------------------------------- the runs


def learn(variation: str, seed: int, flags: list[str], place: Path) -> utils.Run:
    """The finished run of this variation or lever and seed, below `place`; trains it if there is none."""
    other = (VARIATIONS | LEVERS)[variation]
    place = place / variation.replace(" ", "-") / f"seed-{seed}"
    places = [f"--{kind}-dir={place / kind}" for kind in ("result", "checkpoint", "sample")]
    options = main.parse([*flags, *other.flags, f"--seed={seed}", *places, "--resume", "--no-visdom"])
    models.check_machine(options)
    values = {key: getattr(options, key) for key in other.times}
    options = dataclasses.replace(
        options, **{key: type(value)(other.times[key] * value) for key, value in values.items()}
    )
    describe_run = utils.describe_run

    def describe_variation(*arguments: Any) -> dict[str, Any]:
        """config.json with the variation, also among the flags: runs that differ in it are different settings."""
        config = describe_run(*arguments)
        return config | {"variation": variation, "flags": [*config["flags"], f"variation={variation}"]}

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(utils, "describe_run", describe_variation))
        for (owner, name), function in other.instead.items():
            stack.enter_context(mock.patch.object(owner, name, function))
        main.run_training(options)
    return utils.Run.read(options.paths.results)


def with_earlier(content: dict[str, Any], table: Path) -> dict[str, Any]:
    """The content, and that of an earlier call with the same flags and seeds but other variations."""
    try:
        earlier = json.loads(table.read_text())
        if any(earlier[key] != content[key] for key in ("flags", "seeds")):
            return content
        content |= {key: sorted({*earlier[key], *content[key]}) for key in ("commit", "device")}
        known = earlier["average_precision"] | content["average_precision"]
    except (OSError, ValueError, KeyError, TypeError):
        return content
    return content | {"average_precision": {name: known[name] for name in VARIATIONS | LEVERS if name in known}}


def run() -> None:
    parser = utils.Parser(
        description=__doc__.split("\n\n")[0],
        epilog="Other flags, as --flag=value, are passed to every run: see main.py --help.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "variations", nargs="*", metavar="VARIATION", help=f"which (default: all): {'; '.join(VARIATIONS)}"
    )
    parser.add_argument("--levers", action="store_true", help=f"levers instead: {'; '.join(LEVERS)}")
    parser.add_argument(
        "--seeds", nargs="+", action="extend", type=utils.number(0, kind=int), metavar="N", help="(default: 0 1 2)"
    )
    parser.add_argument("--results", type=utils.to_path, default=Path("results"), help="(default: %(default)s)")
    here, flags = parser.parse_known_args()
    here.seeds = here.seeds or [0, 1, 2]
    known, kind = (LEVERS, "levers") if here.levers else (VARIATIONS, "ablations")
    flags = [*(LEVER_FLAGS if here.levers else FLAGS), *flags]
    if unknown := [name for name in here.variations if name not in known]:
        parser.error(f"no such variation: {unknown[0]!r}; there are: {'; '.join(known)}")
    if "critic of 2017" in (here.variations or known) and main.parse(flags).batch_size % 8:
        parser.error("argument --batch-size: the critic of 2017 needs multiples of 8")
    runs = {
        variation: [learn(variation, seed, flags, here.results / kind) for seed in here.seeds]
        for variation in here.variations or known
    }
    precisions = {name: [run.summary["average_precision"] for run in same] for name, same in runs.items()}
    configs = [run.config for same in runs.values() for run in same]
    content = {"flags": flags[1:], "seeds": here.seeds}
    content |= {key: sorted({str(config[key]) for config in configs}) for key in ("commit", "device")}
    content |= {"average_precision": precisions}
    table = here.results / f"{kind}.json"
    utils.write_json(table, with_earlier(content, table))
    print(f"\naverage precision, seeds {here.seeds}:")
    for name, values in precisions.items():
        print(f"  {name:<50} {visual.mean_sd(values, 3)}")


if __name__ == "__main__":
    utils.run_program(run)
