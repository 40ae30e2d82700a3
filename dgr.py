"""Deep generative replay: the method (Shin, Lee, Kim and Kim 2017, arXiv 1705.08690, section 3).

Tasks arrive one after another, each with its own data D_i. A scholar H = (G, S) is a generator and a solver. The
scholar of task i learns from D_i and from the scholar of task i-1, and from nothing else (section 3.1):

    G learns a mix of current inputs x and replayed inputs x' (`mixed_inputs`),
    S learns real pairs (x, y) and replayed pairs (x', y') (`solver_loss`, equation 1).

The new scholar starts from the old one's weights (in a chain, from fresh ones); the old one is a frozen copy. The
replay mode decides where the pairs (x', y') come from: it is an object with `sample(n)`, and `inputs(n)` where x' alone
is cheaper. In generative replay the old generator draws x', and the old solver answers it with y'. No replay is None.

What readers of the paper compare it with is here too: `LwF`, `Joint`, `EWC`, and an output layer per task (`OwnHead`).
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Inputs x (n, channels, 32, 32) float in [0, 1], and targets y: classes (n,) int64 or probabilities (n, classes) float.
# With an output layer (head) per task: (n, heads) int64, NO_TARGET where a head has none, or (n, heads, classes) float.
Pairs = tuple[Tensor, Tensor]
NO_TARGET = -100


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
    """G: draws images from noise, z -> x. Subclasses say how it learns (`learn` from one batch, or `update`).

    net: maps noise (n, z_size), standard normal, to images (n, channels, 32, 32) in [0, 1].
    classes: 0, or the number of classes of a conditional generator, which is told the class of each image (Lesort et
        al. 2018, arXiv 1812.09111): its noise ends in that class as a one-hot vector, (n, z_size + classes).
    """

    def __init__(self, net: nn.Module, z_size: int, classes: int = 0):
        super().__init__()
        self.net = net
        self.z_size, self.classes = z_size, classes
        if classes:
            self.register_buffer("seen", torch.zeros(classes))  # 1 for each class that it has learned

    def noise(self, n: int, y: Tensor | None = None) -> Tensor:
        """z: (n, z_size), standard normal, in float32 or wider; then the classes y (n,), or random ones seen so far."""
        weight = next(self.net.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        z = torch.randn(n, self.z_size, dtype=dtype, device=weight.device)
        if not self.classes:
            return z
        if y is None:  # the largest of one random number per class seen: each class equally often
            y = (torch.rand(n, self.classes, device=weight.device) * self.seen).argmax(dim=1)
        return self.with_classes(z, y)

    def with_classes(self, z: Tensor, y: Tensor) -> Tensor:
        """Noise z (n, z_size) and classes y (n,) for the network: (n, z_size + classes)."""
        return torch.cat([z, F.one_hot(y, self.classes).to(z)], dim=1)

    def sample(self, n: int, z: Tensor | None = None) -> Tensor:
        """x' ~ G: (n, channels, 32, 32) in [0, 1], from fresh noise or from z (n, z_size), the classes then in turn."""
        if z is not None and self.classes and z.shape[1] == self.z_size:
            seen = self.seen.nonzero().flatten() if self.seen.any() else torch.arange(self.classes, device=z.device)
            z = self.with_classes(z, seen[torch.arange(n, device=z.device) % len(seen)])
        with evaluating(self.net):
            return self.net(self.noise(n) if z is None else z)

    def sample_pairs(self, n: int) -> Pairs:
        """x' ~ G and the classes (n,) that a conditional generator drew them for."""
        z = self.noise(n)
        return self.sample(n, z), z[:, self.z_size :].argmax(dim=1)

    def update(self, inputs: Callable[[], Any]) -> dict[str, Tensor]:
        """Learn for one iteration. Returns losses by name, detached.

        inputs: returns a fresh batch (batch_size, channels, 32, 32) each time it is called; if the generator is
            conditional, pairs with their classes (batch_size,). By default, `learn` gets one such batch.
        """
        return self.learn(*inputs()) if self.classes else self.learn(inputs())

    def remember(self) -> "Generator":
        """A frozen copy that samples and never learns: no critic, no optimiser."""
        old = Generator(frozen(self.net), self.z_size, self.classes)
        if self.classes:
            old.seen = self.seen.clone()
        return old


class Solver(nn.Module):
    """S: answers images, x -> y.

    net: maps images (n, channels, 32, 32) to class scores (n, classes), or (n, heads, classes) with a head per task.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def begin_task(self, task: int, *, replays: bool) -> None:
        """Task 1, 2, ... is about to be learned, with replay or without; for solvers with a head per task."""

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (n, classes), before the softmax; with a head per task, (n, heads so far, classes)."""
        return self.net(x)

    def answer(self, x: Tensor) -> Tensor:
        """S(x): the class with the highest score, (n,) int64, or (n, heads)."""
        with evaluating(self):
            return self(x).argmax(dim=-1)

    def answer_softly(self, x: Tensor, temperature: float) -> Tensor:
        """softmax(scores / temperature): class probabilities, like the scores; a higher temperature evens them out."""
        with evaluating(self):
            return (self(x) / temperature).softmax(dim=-1)

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

    kind: "true" (the stored label), "hard" (the old solver's class), "soft" (its class probabilities at this
    temperature; Hinton et al. 2015, arXiv 1503.02531) or "own" (the class that a conditional generator drew).
    """

    kind: str
    temperature: float = 1.0

    def answers(self, old_solver: Solver, x: Tensor) -> Tensor:
        """The old solver's answers to x, of all its heads: (n,) int64, or (n, classes) float if soft (see `Pairs`)."""
        return old_solver.answer_softly(x, self.temperature) if self.kind == "soft" else old_solver.answer(x)


class ReplayMode(nn.Module):
    """The source of replayed pairs; a module, so that its state can be saved and restored.

    old_scholar: H_{i-1}. old_tasks: the data of tasks 1 to i-1, for baselines that may see them.
    """

    target_kinds: tuple[str, ...] = ("hard", "soft")  # the kinds of y' it supports; the first one is the default
    needs_generator = False  # whether it draws from the old generator, which then has to be trained
    from_scratch = False  # whether the new scholar starts from fresh weights
    importance: float | str | None = None  # r of equation 1, if the mode prescribes it
    block = 64  # pairs that a model draws at once; the task loop sets it to what suits the device
    pool = 0  # pairs that a model draws once and replays again and again; 0: it draws each for one use
    distortion = elastic = 0.0  # of what a generator draws, before the old solver answers it (see `distorted`)
    current: Source  # D_i, which the task loop sets

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
        return self._stored(n)[0]

    def _stored(self, n: int) -> Pairs:
        task_of_row = torch.randint(len(self.old_tasks), (n,), device="cpu")
        rows = torch.bincount(task_of_row, minlength=len(self.old_tasks)).tolist()
        xs, ys = zip(*(task.sample(k) for task, k in zip(self.old_tasks, rows, strict=True)), strict=True)
        return torch.cat(xs), torch.cat(ys)


class Joint(ExactReplay):
    """All tasks so far at once, from scratch: the upper bound. With r = 1/i, equation 1 is their mean loss."""

    target_kinds = ("true",)
    from_scratch, importance = True, "auto"


class LwF(ReplayMode):
    """Learning without forgetting: the current task's inputs, answered by the old solver (Li and Hoiem 2016).

    No old input is seen, real or generated (arXiv 1606.09282; section 4.2 of the paper). It is meant for a head per
    task; the old heads then learn the old solver's answers.
    """

    target_kinds = ("soft", "hard")

    def sample(self, n: int) -> Pairs:
        x = self.current.inputs(n)
        return x, self.targets.answers(self.old_scholar.solver, x)

    def inputs(self, n: int) -> Tensor:
        return self.current.inputs(n)


class ModelReplay(ReplayMode):
    """Replay without old data: inputs that a model draws, answered by the old solver.

    They are drawn `block` at a time, and each is used once; or all at the start, into a `pool` to choose from.
    """

    def __init__(self, old_scholar: Scholar, old_tasks: Sequence[Source], targets: Targets):
        super().__init__(old_scholar, old_tasks, targets)
        self._drawn: dict[str, tuple[Tensor, ...]] = {}  # not yet used, or the pool: "inputs" (x',), "pairs" (x', y')

    def draw(self, n: int) -> Tensor:
        """n fresh inputs x', in random order: they are used in the order drawn."""
        raise NotImplementedError

    def draw_pairs(self, n: int) -> Pairs:
        x = self.draw(n)
        return x, self.targets.answers(self.old_scholar.solver, x)

    def sample(self, n: int) -> Pairs:
        return self._next("pairs", n)

    def inputs(self, n: int) -> Tensor:
        return self._next("inputs", n)[0]

    def pooled(self) -> Pairs:
        """All pairs of the pool, drawn when they are first needed."""
        if "pairs" not in self._drawn:
            blocks = [self.draw_pairs(self.block) for _ in range(-(-self.pool // self.block))]
            self._drawn["pairs"] = tuple(torch.cat(parts)[: self.pool] for parts in zip(*blocks, strict=True))
        return self._drawn["pairs"]

    def _next(self, kind: str, n: int) -> tuple[Tensor, ...]:
        if self.pool:
            pairs = self.pooled()
            rows = torch.randint(self.pool, (n,), device=pairs[0].device)
            return tuple(part.index_select(0, rows) for part in pairs)
        drawn = self._drawn.get(kind, ())
        if not drawn or len(drawn[0]) < n:
            size = max(self.block, n)
            fresh = self.draw_pairs(size) if kind == "pairs" else (self.draw(size),)
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

    target_kinds = ("hard", "soft", "own")
    needs_generator = True

    def draw(self, n: int) -> Tensor:
        return self.old_scholar.generator.sample(n)

    def draw_pairs(self, n: int) -> Pairs:
        return self.old_scholar.generator.sample_pairs(n) if self.targets.kind == "own" else super().draw_pairs(n)

    def sample(self, n: int) -> Pairs:
        if not self.distorts:
            return self.drawn(n)
        if self.targets.kind == "own":
            x, y = self.drawn(n)
            return distorted(x, self.distortion, self.elastic), y
        x = distorted(self.inputs(n), self.distortion, self.elastic)
        return x, self.targets.answers(self.old_scholar.solver, x)

    def drawn(self, n: int) -> Pairs:
        """n pairs without distortion."""
        return super().sample(n)

    @property
    def distorts(self) -> bool:
        return bool(self.distortion or self.elastic)


class NoiseReplay(ModelReplay):
    """Gaussian noise as inputs, answered by the old solver: shows what the generator's inputs are worth.

    The noise has the mean and standard deviation of the images' values; with any others, the solver's batch
    normalisation would collect statistics that fit neither. x' may lie outside [0, 1]. A solver that blurs or distorts
    its inputs evens the noise out.
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
    "lwf": LwF,
    "joint": Joint,
}


@dataclass(frozen=True)
class OwnHead:
    """The data of a task whose labels only its own output layer has to give.

    head: the task's, from 0. heads: of the tasks so far, or of the old tasks for replay.
    """

    source: Source
    head: int
    heads: int

    def sample(self, n: int) -> Pairs:
        """n pairs, y (n, heads): the label for this head, NO_TARGET for the others."""
        x, y = self.source.sample(n)
        targets = y.new_full((len(y), self.heads), NO_TARGET)
        targets[:, self.head] = y
        return x, targets

    def inputs(self, n: int) -> Tensor:
        return self.source.inputs(n)


class EWC(nn.Module):
    """Elastic weight consolidation: weights that mattered to old tasks stay near where they were.

    Added to the solver's loss: weight / 2 * sum_t sum_k F_tk (theta_k - theta*_tk)^2, over old tasks t and parameters k
    (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3). theta*_t is what the solver was after task t, and F_t the
    diagonal of its Fisher information: E[(d log p(y|x) / d theta_k)^2], x of task t, y ~ p(y|x) drawn by the solver.
    """

    images = 500  # for each Fisher information, one at a time

    def __init__(self, weight: float):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight), persistent=False)
        self.anchors: list[dict[str, Pairs]] = []  # for each old task: F and theta* by parameter

    def forward(self, solver: Solver) -> Tensor:
        """The penalty, a scalar: 0 before the first task has been learned."""
        kept = [(name, *values) for anchors in self.anchors for name, values in anchors.items()]
        terms = [(fisher * (solver.get_parameter(name) - anchor).square()).sum() for name, fisher, anchor in kept]
        return self.weight / 2 * sum(terms, torch.zeros_like(self.weight))

    def remember(self, solver: Solver, task: Source) -> None:
        """Keep the solver's parameters and their Fisher information on a task just learned."""
        parameters = {name: value for name, value in solver.named_parameters() if value.requires_grad}
        fisher = {name: torch.zeros_like(value) for name, value in parameters.items()}
        with evaluating(solver), torch.enable_grad():  # one image at a time: its statistics are no batch's
            for x in task.inputs(self.images).split(1):
                scores = solver(x)
                scores = (scores[:, -1] if scores.dim() == 3 else scores).log_softmax(dim=1)  # the task's own head
                y = torch.multinomial(scores.detach().exp(), 1)
                grads = torch.autograd.grad(scores.gather(1, y).sum(), [*parameters.values()], materialize_grads=True)
                for name, grad in zip(parameters, grads, strict=True):
                    fisher[name] += grad.square() / self.images
        self.anchors.append({name: (fisher[name], value.detach().clone()) for name, value in parameters.items()})

    def get_extra_state(self) -> list[dict[str, Pairs]]:
        return self.anchors

    def set_extra_state(self, state: list[dict[str, Pairs]]) -> None:
        device = self.weight.device  # the state may come from another one
        self.anchors = [{name: (f.to(device), a.to(device)) for name, (f, a) in old.items()} for old in state]


# To add a penalty, write a class like this and add a line here.
PENALTIES: dict[str, Callable[[float], EWC] | None] = {"none": None, "ewc": EWC}
Penalty = Callable[[Solver], Tensor] | None


def distorted(x: Tensor, strength: float, elastic: float = 0.0) -> Tensor:
    """Images (n, channels, size, size), each turned, sheared, scaled and shifted at random, and perhaps bent.

    At a strength of 1, by up to 15 degrees, 0.2, about 12 % (width and height apart) and 4 % of a side. elastic: the
    standard deviation, in pixels, of displacements besides, alike for neighbouring pixels. Beyond its border, an image
    goes on as it ends there.
    """
    if not len(x):
        return x
    draws = strength * (2 * torch.rand(6, len(x), dtype=x.dtype, device=x.device) - 1)
    angle, shear, shift_x, shift_y = draws[0] * math.pi / 12, 0.2 * draws[1], 0.08 * draws[2], 0.08 * draws[3]
    wide, high = (0.12 * draws[4:]).exp()
    rows = [angle.cos() * wide, (shear - angle.sin()) * high, shift_x]  # coordinates go from -1 to 1
    rows += [angle.sin() * wide, angle.cos() * high, shift_y]
    places = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(x.shape), align_corners=False)
    if elastic:
        places = places + elastic * displacements(x)
    edge = 1 - 1 / x.shape[-1]  # the centres of the outermost pixels; older PyTorch has no border mode on Apple's GPUs
    return F.grid_sample(x, places.clamp(-edge, edge), align_corners=False)


def displacements(x: Tensor) -> Tensor:
    """Smooth random displacements (n, size, size, 2) for images (n, channels, size, size).

    Their standard deviation is one pixel, where a side counts as 2 (see `grid_sample`). They are noise smoothed by a
    Gaussian with a standard deviation of an eighth of a side (Simard et al. 2003, elastic distortions).
    """
    size = x.shape[-1]
    place = torch.arange(size, dtype=x.dtype, device=x.device)
    smooth = (-((place[:, None] - place) * 8 / size).square() / 2).exp()
    smooth = smooth / smooth.norm(dim=1, keepdim=True)
    noise = torch.randn(len(x), 2, size, size, dtype=x.dtype, device=x.device)
    return 2 / size * (smooth @ noise @ smooth.T).permute(0, 2, 3, 1)


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
    k = number_of_current(r, n)
    return torch.cat([current.inputs(k), replay.inputs(n - k)])


def mixed_pairs(current: Source, replay: Source | None, r: float, n: int) -> Pairs:
    """`mixed_inputs` for a conditional generator: inputs and their classes (n,), the most probable ones if soft."""
    if replay is None or r == 1:
        pairs = [for_generator(current, n)]
    else:
        k = number_of_current(r, n)
        pairs = [for_generator(current, k), for_generator(replay, n - k)]
    # In a chain, current ones may be soft, too.
    classes = [y.argmax(dim=1) if y.is_floating_point() else y for _, y in pairs]
    return torch.cat([x for x, _ in pairs]), torch.cat(classes)


def for_generator(source: Source, n: int) -> Pairs:
    """n pairs for a generator: what the old one draws is distorted for the solver alone."""
    return source.drawn(n) if isinstance(source, GenerativeReplay) else source.sample(n)


def for_solver(source: Source, n: int, distortion: float) -> Pairs:
    """n pairs for a solver, distorted; what already was before the old solver answered it stays as it is."""
    x, y = source.sample(n)
    already = isinstance(source, GenerativeReplay) and source.distorts
    return distorted(x, distortion) if distortion and not already else x, y


def number_of_current(r: float, n: int) -> int:
    """How many of n inputs are current, if each is with probability r."""
    # Counted on the CPU: every batch would wait for a count that is on the GPU.
    return int((torch.rand(n, device="cpu") < r).sum())


def loss(scores: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean cross-entropy of scores (n, classes) with classes y (n,), or with probabilities y (n, classes).

    Scores are divided by the temperature at which probabilities were taken; its square restores the gradient's size
    (Hinton et al. 2015, section 2). With a head per task, scores (n, heads, classes) are those of at least the heads
    that y has targets for, and the mean is over all targets.
    """
    if scores.dim() == 3:
        scores, y = scores[:, : y.shape[1]].flatten(0, 1), y.flatten(0, 1)
    if y.is_floating_point():
        return temperature**2 * F.cross_entropy(scores / temperature, y)
    return F.cross_entropy(scores, y, ignore_index=NO_TARGET)


def solver_loss(
    solver: Solver, current: Pairs, replayed: Pairs | None, r: float, temperature: float = 1.0, penalty: Penalty = None
) -> Tensor:
    """Equation 1: r * E_{D_i}[loss(S_i(x), y)] + (1 - r) * E_{G_{i-1}}[loss(S_i(x'), y')], y' = S_{i-1}(x').

    `Targets` says what y' is. Without replay the loss is E_{D_i}[loss(S_i(x), y)]. A penalty is added to it.
    """
    x, y = current
    if replayed is None:
        value = loss(solver(x), y, temperature)
    else:
        x_replayed, y_replayed = replayed
        # One forward pass for both: in two, batch normalisation would normalise each kind separately.
        scores, scores_replayed = solver(torch.cat([x, x_replayed])).split([len(y), len(y_replayed)])
        value = r * loss(scores, y, temperature) + (1 - r) * loss(scores_replayed, y_replayed, temperature)
    return value if penalty is None else value + penalty(solver)


def learn_generator(
    generator: Generator, current: Source, replay: Source | None, *, r: float, iterations: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Train G on the inputs of all tasks so far. Yields the losses of each iteration by name."""
    generator.train()
    mixed = mixed_pairs if generator.classes else mixed_inputs
    for _ in range(iterations):
        yield generator.update(lambda: mixed(current, replay, r, batch_size))


def learn_solver(
    solver: Solver,
    current: Source,
    replay: Source | None,
    *,
    r: float,
    iterations: int,
    batch_size: int,
    temperature: float = 1.0,
    penalty: Penalty = None,
    distortion: float = 0.0,
) -> Iterator[dict[str, Tensor]]:
    """Train S on the answers of all tasks so far. Yields the loss of each iteration by name.

    distortion: of the images (see `distorted`), whose targets stay as they are.
    """
    solver.train()
    equation_1 = partial(solver_loss, solver, r=r, temperature=temperature, penalty=penalty)
    for _ in range(iterations):
        pairs = for_solver(current, batch_size, distortion)
        yield solver.update(equation_1, pairs, None if replay is None else for_solver(replay, batch_size, distortion))
