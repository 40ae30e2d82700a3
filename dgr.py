"""Deep generative replay: the method (Shin, Lee, Kim and Kim 2017, arXiv 1705.08690, section 3).

Tasks arrive one after another, each with its own data D_i. A scholar H = (G, S) is a generator and a solver.
The scholar of task i learns from D_i and from the scholar of task i-1 alone (section 3.1):

    G learns a mix of current inputs x and replayed inputs x' (`MixedInputs`),
    S learns real pairs (x, y) and replayed pairs (x', y') (`solver_loss`, equation 1).

Where the pairs (x', y') come from is the replay mode: an object with one method, `sample(n)`. In generative replay
it is the scholar itself, as it was after the last task: x' from its generator, y' its solver's answer to x'.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pairs = tuple[Tensor, Tensor]  # inputs x (n, channels, 32, 32) float in [0, 1], targets y (n,) int64


class Source(Protocol):
    """Anything pairs can be drawn from: a task's data, or a replay mode."""

    def sample(self, n: int) -> Pairs: ...


@contextmanager
def answering(module: nn.Module) -> Iterator[None]:
    """Use a network without changing it: no gradients, evaluation mode, buffers and mode left as they were."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def frozen(network: nn.Module) -> nn.Module:
    """A copy that only answers: evaluation mode, no parameter that asks for a gradient."""
    with torch.no_grad():
        return copy.deepcopy(network).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ the scholar


class Generator(nn.Module):
    """G: draws images from noise, z -> x. Subclasses say how it learns (`update`).

    net: from noise (n, z_size), standard normal, to images (n, channels, 32, 32) in [0, 1].
    """

    def __init__(self, net: nn.Module, z_size: int):
        super().__init__()
        self.net = net
        self.z_size = z_size

    def noise(self, n: int) -> Tensor:
        """z: (n, z_size), standard normal."""
        return torch.randn(n, self.z_size, device=next(self.net.parameters()).device)

    def sample(self, n: int, z: Tensor | None = None) -> Tensor:
        """x' ~ G: (n, channels, 32, 32) in [0, 1], from fresh noise or from z (n, z_size)."""
        with answering(self.net):
            return self.net(self.noise(n) if z is None else z)

    def update(self, inputs: Callable[[], Tensor]) -> dict[str, Tensor]:
        """One iteration of learning; every call of `inputs` gives a fresh batch. Returns losses by name, detached."""
        raise NotImplementedError

    def remember(self) -> "Generator":
        """A frozen copy that samples and never learns: no critic, no optimiser."""
        return Generator(frozen(self.net), self.z_size)


class Solver(nn.Module):
    """S: answers images, x -> y.

    net: from images (n, channels, 32, 32) to class scores (n, classes).
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (n, classes), before the softmax."""
        return self.net(x)

    def answer(self, x: Tensor) -> Tensor:
        """S(x): the class with the highest score, (n,) int64."""
        with answering(self.net):
            return self.net(x).argmax(dim=1)

    def update(self, loss: Tensor) -> None:
        """One step down the gradient of a loss from `solver_loss`."""
        raise NotImplementedError

    def remember(self) -> "Solver":
        """A frozen copy that answers and never learns."""
        return Solver(frozen(self.net))


class Scholar(nn.Module):
    """H = (G, S). Once remembered it is generative replay: pairs of what G draws and what S answers."""

    def __init__(self, generator: Generator, solver: Solver):
        super().__init__()
        self.generator = generator
        self.solver = solver

    def sample(self, n: int) -> Pairs:
        """n replayed pairs (x', y'): x' ~ G, y' = S(x')."""
        x = self.generator.sample(n)
        return x, self.solver.answer(x)

    def remember(self) -> "Scholar":
        """The old scholar H_{i-1} that task i learns from."""
        return Scholar(self.generator.remember(), self.solver.remember())


# ----------------------------------------------------------------------------------------------- replay modes


class NoReplay:
    """Sequential training, the lower reference: nothing of the past comes back."""

    def __init__(self, old_scholar: Scholar, old_tasks: Sequence[Source]):
        self._like = old_tasks[0]

    def sample(self, n: int) -> Pairs:
        """No pairs, whatever n."""
        return self._like.sample(0)


class ExactReplay:
    """Stored real pairs of all old tasks, each task equally often: the upper reference."""

    def __init__(self, old_scholar: Scholar, old_tasks: Sequence[Source]):
        self.old_tasks = old_tasks

    def sample(self, n: int) -> Pairs:
        """n real pairs (x, y), y the true labels, in the order of their tasks."""
        task_of_row = torch.randint(len(self.old_tasks), (n,))
        rows = torch.bincount(task_of_row, minlength=len(self.old_tasks)).tolist()
        xs, ys = zip(*(task.sample(k) for task, k in zip(self.old_tasks, rows, strict=True)), strict=True)
        return torch.cat(xs), torch.cat(ys)


class GenerativeReplay:
    """Pairs (x', y') of the old scholar: no old data is kept.

    They are drawn `block` at a time, which costs a large batch's time, and handed out in that order, none twice.
    """

    def __init__(self, old_scholar: Scholar, old_tasks: Sequence[Source], block: int = 512):
        self.old_scholar = old_scholar.remember()
        self.block = block
        self._x, self._y = self.old_scholar.sample(0)

    def sample(self, n: int) -> Pairs:
        """n replayed pairs (x', y'), y' the old solver's class for x'."""
        if len(self._y) < n:
            x, y = self.old_scholar.sample(max(self.block, n))
            self._x, self._y = torch.cat([self._x, x]), torch.cat([self._y, y])
        drawn = self._x[:n], self._y[:n]
        self._x, self._y = self._x[n:], self._y[n:]
        return drawn


# A new mode is one class like these and one line here. Old tasks: the data of tasks 1..i-1, for references that may
# see them; never empty, for at the first task there is nothing to replay.
REPLAY_MODES: dict[str, Callable[[Scholar, Sequence[Source]], Source]] = {
    "none": NoReplay,
    "exact-replay": ExactReplay,
    "generative-replay": GenerativeReplay,
}


# ---------------------------------------------------------------------------------------- learning a new task


def importance_of_new_task(setting: float | str, task: int) -> float:
    """r of equation 1 at task 1, 2, ...: the setting itself, or 1/task for "auto", which weighs all tasks alike.

    The first task has nothing to be weighed against: r is 1.
    """
    if task == 1:
        return 1.0
    return 1 / task if setting == "auto" else float(setting)


class MixedInputs:
    """The inputs G learns from: each is current, x ~ D_i, with probability r, else replayed, x' (section 3.1)."""

    def __init__(self, current: Source, replay: Source | None, r: float):
        self.current, self.replay, self.r = current, replay, r

    def sample(self, n: int) -> Tensor:
        """n inputs (n, channels, 32, 32), the current ones first."""
        if self.replay is None or self.r == 1:
            return self.current.sample(n)[0]
        # Drawn on the CPU: a count taken from the GPU would make every batch wait for it.
        current = int((torch.rand(n, device="cpu") < self.r).sum())
        return torch.cat([self.current.sample(current)[0], self.replay.sample(n - current)[0]])


def solver_loss(solver: Solver, current: Pairs, replayed: Pairs, r: float) -> Tensor:
    """Equation 1: r * E_D[loss(S(x), y)] + (1 - r) * E_G[loss(S(x'), y')], loss being the cross-entropy.

    Without replayed pairs the second term is empty and the first has weight 1.
    """
    (x, y), (x_replayed, y_replayed) = current, replayed
    if len(y_replayed) == 0:
        return F.cross_entropy(solver(x), y)
    # One forward for both: in two, batch normalisation would normalise each kind apart.
    scores, scores_replayed = solver(torch.cat([x, x_replayed])).split([len(y), len(y_replayed)])
    return r * F.cross_entropy(scores, y) + (1 - r) * F.cross_entropy(scores_replayed, y_replayed)


def learn_generator(
    generator: Generator, current: Source, replay: Source | None, *, r: float, iterations: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Let G learn the inputs of all tasks so far. Yields the losses of each iteration by name."""
    generator.train()
    inputs = MixedInputs(current, replay, r)
    for _ in range(iterations):
        yield generator.update(lambda: inputs.sample(batch_size))


def learn_solver(
    solver: Solver, current: Source, replay: Source | None, *, r: float, iterations: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Let S learn the answers of all tasks so far. Yields the loss of each iteration by name."""
    solver.train()
    for _ in range(iterations):
        pairs = current.sample(batch_size)
        replayed = current.sample(0) if replay is None else replay.sample(batch_size)
        loss = solver_loss(solver, pairs, replayed, r)
        solver.update(loss)
        yield {"loss": loss.detach()}
