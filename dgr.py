"""Deep generative replay: the method (Shin, Lee, Kim and Kim 2017, arXiv 1705.08690, section 3).

Tasks arrive one after another, each with its own data D_i. A scholar H = (G, S) is a generator and a solver. The
scholar of task i learns from D_i and from the scholar of task i-1, and from nothing else (section 3.1):

    G learns a mix of current inputs x and replayed inputs x' (`mixed_inputs`),
    S learns real pairs (x, y) and replayed pairs (x', y') (`solver_loss`, equation 1).

The new scholar starts from the old one's weights (in a chain, from fresh ones); the old one is a frozen copy. The
replay mode decides where the pairs (x', y') come from: it is an object with `sample(n)`, and `inputs(n)` where x' alone
is cheaper. In generative replay the old generator draws x', and the old solver answers it with y'. No replay is None.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Inputs x (n, channels, 32, 32) float in [0, 1], and targets y: classes (n,) int64 or probabilities (n, classes) float.
Pairs = tuple[Tensor, Tensor]


class Source(Protocol):
    """Anything that yields pairs, or inputs alone: the data of a task, or a replay mode."""

    def sample(self, n: int) -> Pairs: ...

    def inputs(self, n: int) -> Tensor: ...


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Use a network without changing it: evaluation mode, no gradients, and its own mode restored afterwards."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


def frozen(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose parameters never learn.

    A network that can make a cheaper copy with the same answers has a method of this name.
    """
    with torch.no_grad():
        if hasattr(network, "frozen"):
            return network.frozen()
        return copy.deepcopy(network).eval().requires_grad_(False)


class Generator(nn.Module):
    """G: draws images from noise, z -> x. Subclasses say how it learns (`update`).

    net: maps noise (n, z_size), standard normal, to images (n, channels, 32, 32) in [0, 1].
    """

    def __init__(self, net: nn.Module, z_size: int):
        super().__init__()
        self.net = net
        self.z_size = z_size

    def noise(self, n: int) -> Tensor:
        """z: (n, z_size), standard normal, in float32 or wider."""
        weight = next(self.net.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.randn(n, self.z_size, dtype=dtype, device=weight.device)

    def sample(self, n: int, z: Tensor | None = None) -> Tensor:
        """x' ~ G: (n, channels, 32, 32) in [0, 1], from fresh noise or from z (n, z_size)."""
        with evaluating(self.net):
            return self.net(self.noise(n) if z is None else z)

    def update(self, inputs: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Learn for one iteration. Returns losses by name, detached.

        inputs: returns a fresh batch (batch_size, channels, 32, 32) each time it is called.
        """
        raise NotImplementedError

    def remember(self) -> "Generator":
        """A frozen copy that samples and never learns: no critic, no optimiser."""
        return Generator(frozen(self.net), self.z_size)


class Solver(nn.Module):
    """S: answers images, x -> y.

    net: maps images (n, channels, 32, 32) to class scores (n, classes).
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (n, classes), before the softmax."""
        return self.net(x)

    def answer(self, x: Tensor) -> Tensor:
        """S(x): the class with the highest score, (n,) int64."""
        with evaluating(self):
            return self(x).argmax(dim=1)

    def answer_softly(self, x: Tensor, temperature: float) -> Tensor:
        """softmax(scores / temperature): class probabilities (n, classes); a higher temperature evens them out."""
        with evaluating(self):
            return (self(x) / temperature).softmax(dim=1)

    def update(self, loss: Callable[..., Tensor], current: Pairs, replayed: Pairs | None) -> dict[str, Tensor]:
        """Take one step down the gradient of loss(current, replayed), equation 1. Returns {"loss": value}, detached."""
        raise NotImplementedError

    def remember(self) -> "Solver":
        """A frozen copy that answers and never learns."""
        net = frozen(self.net)
        return Solver(net).train(net.training)


class Scholar(nn.Module):
    """H = (G, S)."""

    def __init__(self, generator: Generator, solver: Solver):
        super().__init__()
        self.generator = generator
        self.solver = solver

    def remember(self) -> "Scholar":
        """The old scholar H_{i-1} that task i learns from."""
        return Scholar(self.generator.remember(), self.solver.remember())


@dataclass(frozen=True)
class Targets:
    """y' of equation 1: the labels of replayed images.

    kind: "true" (the stored label), "hard" (the old solver's class) or "soft" (its class probabilities at this
    temperature; Hinton et al. 2015, arXiv 1503.02531).
    """

    kind: str
    temperature: float = 1.0

    def answers(self, old_solver: Solver, x: Tensor) -> Tensor:
        """The old solver's answers to x: (n,) int64, or (n, classes) float if soft."""
        return old_solver.answer_softly(x, self.temperature) if self.kind == "soft" else old_solver.answer(x)


class ReplayMode(nn.Module):
    """The source of replayed pairs; a module, so that its state can be saved and restored.

    old_scholar: H_{i-1}. old_tasks: the data of tasks 1 to i-1, for baselines that may see them.
    """

    target_kinds: tuple[str, ...] = ("hard", "soft")  # the kinds of y' it supports; the first one is the default
    needs_generator = False  # whether it draws from the old generator, which then has to be trained
    block = 64  # pairs that a model draws at once; the task loop sets it to what suits the device

    def __init__(self, old_scholar: Scholar, old_tasks: Sequence[Source], targets: Targets):
        super().__init__()
        self.old_scholar = old_scholar.remember()
        self.targets = targets

    def sample(self, n: int) -> Pairs:
        """n replayed pairs (x', y'); n may be 0."""
        raise NotImplementedError

    def inputs(self, n: int) -> Tensor:
        """n replayed inputs x', for the generator; override it where y' would cost extra."""
        return self.sample(n)[0]


class ExactReplay(ReplayMode):
    """Stored real inputs, every old task equally often: the upper reference."""

    target_kinds = ("true", "hard", "soft")

    def __init__(self, old_scholar: Scholar, old_tasks: Sequence[Source], targets: Targets):
        super().__init__(old_scholar, old_tasks, targets)
        self.old_tasks = old_tasks

    def sample(self, n: int) -> Pairs:
        """n real inputs, task by task, with their true labels or the old solver's answers."""
        x, y = self._stored(n)
        return x, y if self.targets.kind == "true" else self.targets.answers(self.old_scholar.solver, x)

    def inputs(self, n: int) -> Tensor:
        """n real inputs, task by task."""
        return self._stored(n)[0]

    def _stored(self, n: int) -> Pairs:
        task_of_row = torch.randint(len(self.old_tasks), (n,), device="cpu")
        rows = torch.bincount(task_of_row, minlength=len(self.old_tasks)).tolist()
        xs, ys = zip(*(task.sample(k) for task, k in zip(self.old_tasks, rows, strict=True)), strict=True)
        return torch.cat(xs), torch.cat(ys)


class ModelReplay(ReplayMode):
    """Replay without old data: inputs that a model draws, answered by the old solver.

    They are drawn `block` at a time, and each is used once.
    """

    def __init__(self, old_scholar: Scholar, old_tasks: Sequence[Source], targets: Targets):
        super().__init__(old_scholar, old_tasks, targets)
        self._drawn: dict[
            str, tuple[Tensor, ...]
        ] = {}  # not used yet: (x',) for the generator, (x', y') for the solver

    def draw(self, n: int) -> Tensor:
        """n fresh inputs x', in random order: they are used in the order drawn."""
        raise NotImplementedError

    def sample(self, n: int) -> Pairs:
        """The next n replayed pairs (x', y')."""
        return self._next("pairs", n)

    def inputs(self, n: int) -> Tensor:
        """The next n replayed inputs x'."""
        return self._next("inputs", n)[0]

    def _next(self, kind: str, n: int) -> tuple[Tensor, ...]:
        drawn = self._drawn.get(kind, ())
        if not drawn or len(drawn[0]) < n:
            x = self.draw(max(self.block, n))
            fresh = (x, self.targets.answers(self.old_scholar.solver, x)) if kind == "pairs" else (x,)
            drawn = tuple(map(torch.cat, zip(drawn, fresh, strict=True))) if drawn else fresh
        self._drawn[kind] = tuple(part[n:] for part in drawn)
        return tuple(part[:n] for part in drawn)

    def get_extra_state(self) -> dict[str, tuple[Tensor, ...]]:
        return {kind: tuple(part.clone() for part in drawn) for kind, drawn in self._drawn.items()}

    def set_extra_state(self, state: dict[str, tuple[Tensor, ...]]) -> None:
        device = next(self.old_scholar.parameters()).device  # the state may come from another one
        self._drawn = {kind: tuple(part.to(device) for part in drawn) for kind, drawn in state.items()}


class GenerativeReplay(ModelReplay):
    """Inputs from the old generator, answered by the old solver: the method."""

    needs_generator = True

    def draw(self, n: int) -> Tensor:
        return self.old_scholar.generator.sample(n)


class NoiseReplay(ModelReplay):
    """Gaussian noise as inputs, answered by the old solver: shows what the generator's inputs are worth.

    The noise has the mean and standard deviation of the images' values; with any others, the solver's batch
    normalisation would collect statistics that fit neither. x' may lie outside [0, 1].
    """

    def __init__(self, old_scholar: Scholar, old_tasks: Sequence[Source], targets: Targets):
        super().__init__(old_scholar, old_tasks, targets)
        images = torch.cat([task.sample(100)[0] for task in old_tasks])
        self._shape = images.shape[1:]
        self.register_buffer("_deviation_and_mean", torch.stack(torch.std_mean(images)))

    def draw(self, n: int) -> Tensor:
        deviation, mean = self._deviation_and_mean
        return mean + deviation * torch.randn(n, *self._shape, device=mean.device)


# To add a mode, write a class like these and add a line here.
REPLAY_MODES: dict[str, type[ReplayMode] | None] = {
    "none": None,  # sequential training: the lower reference
    "exact-replay": ExactReplay,
    "generative-replay": GenerativeReplay,
    "noise-replay": NoiseReplay,
}


def importance_of_new_task(setting: float | str, task: int) -> float:
    """r of equation 1 at task 1, 2, ...: the setting itself, or 1/task for "auto", which weighs all tasks equally.

    The first task has nothing to be weighed against: r is 1.
    """
    if task == 1:
        return 1.0
    return 1 / task if setting == "auto" else float(setting)


def mixed_inputs(current: Source, replay: Source | None, r: float, n: int) -> Tensor:
    """n inputs for G: each is current, x ~ D_i, with probability r, and otherwise replayed, x' (section 3.1).

    Returns (n, channels, 32, 32), the current ones first.
    """
    if replay is None or r == 1:
        return current.inputs(n)
    # Counted on the CPU: every batch would wait for a count that is on the GPU.
    k = int((torch.rand(n, device="cpu") < r).sum())
    return torch.cat([current.inputs(k), replay.inputs(n - k)])


def loss(scores: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean cross-entropy of scores (n, classes) with classes y (n,), or with probabilities y (n, classes).

    Scores are divided by the temperature at which probabilities were taken; its square restores the gradient's size
    (Hinton et al. 2015, section 2).
    """
    if y.is_floating_point():
        return temperature**2 * F.cross_entropy(scores / temperature, y)
    return F.cross_entropy(scores, y)


def solver_loss(solver: Solver, current: Pairs, replayed: Pairs | None, r: float, temperature: float = 1.0) -> Tensor:
    """Equation 1: r * E_{D_i}[loss(S_i(x), y)] + (1 - r) * E_{G_{i-1}}[loss(S_i(x'), y')], y' = S_{i-1}(x').

    `Targets` says what y' is. Without replay the loss is E_{D_i}[loss(S_i(x), y)].
    """
    x, y = current
    if replayed is None:
        return loss(solver(x), y, temperature)
    x_replayed, y_replayed = replayed
    # One forward pass for both: in two, batch normalisation would normalise each kind separately.
    scores, scores_replayed = solver(torch.cat([x, x_replayed])).split([len(y), len(y_replayed)])
    return r * loss(scores, y, temperature) + (1 - r) * loss(scores_replayed, y_replayed, temperature)


def learn_generator(
    generator: Generator, current: Source, replay: Source | None, *, r: float, iterations: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Train G on the inputs of all tasks so far. Yields the losses of each iteration by name."""
    generator.train()
    for _ in range(iterations):
        yield generator.update(lambda: mixed_inputs(current, replay, r, batch_size))


def learn_solver(
    solver: Solver,
    current: Source,
    replay: Source | None,
    *,
    r: float,
    iterations: int,
    batch_size: int,
    temperature: float = 1.0,
) -> Iterator[dict[str, Tensor]]:
    """Train S on the answers of all tasks so far. Yields the loss of each iteration by name."""
    solver.train()
    equation_1 = partial(solver_loss, solver, r=r, temperature=temperature)
    for _ in range(iterations):
        pairs = current.sample(batch_size)
        yield solver.update(equation_1, pairs, None if replay is None else replay.sample(batch_size))
