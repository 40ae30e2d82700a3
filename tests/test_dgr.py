"""The method: scholar, replay modes, importance and equation 1; and how the modules depend on each other."""

import ast
import math
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import reference
import torch
from conftest import ROOT, SMALL, Constant, assert_same_state, relative_error, small_scholar, state
from torch import nn

import data
import dgr
import models

HARD = dgr.Targets("hard")
MODES = [mode for mode in dgr.REPLAY_MODES.values() if mode]


def generative_replay(scholar: dgr.Scholar, block: int = 512) -> dgr.GenerativeReplay:
    replay = dgr.GenerativeReplay(scholar, [Constant(0.5, 1)], HARD)
    replay.block = block
    return replay


def make_replay(mode, scholar, targets=HARD):
    replay = mode(scholar, [Constant(0.2, 1), Constant(0.4, 2)], targets)
    replay.current = Constant(0.25, 2)
    return replay


# ------------------------------------------------------------------------------------------------- the scholar


def test_sampling_and_answering_leave_buffers_modes_and_the_random_stream_as_they_were():
    """differences.md, 9: and answers to an image do not depend on the rest of its batch."""
    scholar, stream = small_scholar(), torch.get_rng_state()
    before = state(scholar)
    x = scholar.generator.sample(6, torch.linspace(-1, 1, 30).view(6, 5))
    each = torch.cat([scholar.solver.answer_softly(image[None], 1.0) for image in x])
    torch.testing.assert_close(scholar.solver.answer_softly(x, 1.0), each)
    assert_same_state(scholar, before)
    assert all(module.training for module in scholar.modules())
    assert torch.equal(torch.get_rng_state(), stream)


def test_noise_is_standard_normal():
    """differences.md, 6."""
    z = small_scholar().generator.noise(4000)
    assert z.shape == (4000, 5)
    assert (z.mean().item(), z.std().item()) == pytest.approx((0, 1), abs=0.035)  # five standard deviations
    assert z.pow(4).mean().item() == pytest.approx(3, abs=0.35)


def test_a_solver_answers_by_its_own_forward():
    class Negative(dgr.Solver):
        def forward(self, x):
            return -self.net(x)

    solver = Negative(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    x = torch.randn(5, 1, 2, 2)
    scores = solver(x)
    assert torch.equal(solver.answer(x), scores.argmax(dim=1))
    torch.testing.assert_close(solver.answer_softly(x, 2.0), (scores / 2).softmax(dim=1))


def test_old_scholar_is_generator_and_solver_alone():
    """No critic, no optimiser, no gradients, evaluation mode."""
    old = small_scholar().remember()
    assert not hasattr(old.generator, "critic")
    assert not any(isinstance(value, torch.optim.Optimizer) for m in old.modules() for value in vars(m).values())
    assert not any(parameter.requires_grad for parameter in old.parameters())
    assert not any(module.training for module in (*old.generator.net.modules(), *old.solver.net.modules()))


@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-4), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
def test_old_scholar_draws_and_answers_as_the_scholar_does(dtype, bound):
    """It folds batch normalisation into convolutions: the same function, whatever the statistics."""
    scholar = models.make_scholar(1, 10, SMALL, compute_dtype=dtype)
    for layer in (layer for layer in scholar.modules() if isinstance(layer, nn.BatchNorm2d)):
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    old = scholar.remember()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in old.solver.modules())
    z = torch.randn(50, SMALL.generator_z_size)
    x = scholar.generator.sample(50, z)
    assert relative_error(old.generator.sample(50, z), x) < bound
    with dgr.evaluating(scholar.solver):
        assert relative_error(old.solver(x), scholar.solver(x)) < bound
    assert old.generator.noise(2).dtype == torch.float32


def test_old_scholar_does_not_learn_with_the_new_one():
    scholar = small_scholar()
    replay = generative_replay(scholar)
    before = state(replay.old_scholar)
    how = {"r": 0.5, "iterations": 2, "batch_size": 4}
    list(dgr.learn_generator(scholar.generator, Constant(0.1, 2), replay, **how))
    list(dgr.learn_solver(scholar.solver, Constant(0.1, 2), replay, **how))
    assert_same_state(replay.old_scholar, before)


# ------------------------------------------------------------------------------------------------ replay modes


@pytest.mark.parametrize("mode", [mode for mode in MODES if "soft" in mode.target_kinds])
@pytest.mark.parametrize("targets", [HARD, dgr.Targets("soft", 2.0)], ids=lambda targets: targets.kind)
def test_replayed_targets_are_the_old_solvers_answers_without_a_graph(mode, targets):
    """differences.md, 3 and 10."""
    scholar = small_scholar()
    scholar.solver(torch.rand(16, 1, 32, 32))
    replay = make_replay(mode, scholar, targets)
    replay.old_scholar.requires_grad_(True)  # as if it had not been frozen
    for n in (6, 0):
        x, y = replay.sample(n)
        assert x.shape == (n, 1, 32, 32) and x.dtype == torch.float32
        assert not x.requires_grad and not y.requires_grad
        scores = replay.old_scholar.solver(x).detach()
        torch.testing.assert_close(y, scores.argmax(dim=1) if targets is HARD else (scores / 2).softmax(dim=1))


@pytest.mark.parametrize("mode", MODES)
def test_inputs_for_the_generator_are_the_same_without_asking_for_answers(mode, monkeypatch):
    replay = make_replay(mode, small_scholar())
    torch.manual_seed(3)
    x, _ = replay.sample(6)
    monkeypatch.setattr(dgr.Targets, "answers", None)
    torch.manual_seed(3)
    assert torch.equal(replay.inputs(6), x)


def test_exact_replay_draws_each_old_task_equally_often_with_true_labels():
    """differences.md, 11."""
    tasks = [Constant(0.1, 1), Constant(0.2, 2), Constant(0.3, 3)]
    x, y = dgr.ExactReplay(small_scholar(), tasks, dgr.Targets("true")).sample(3000)
    assert torch.allclose(x[:, 0, 0, 0] * 10, y.float())
    counts = torch.bincount(y)[1:]
    assert counts.sum() == 3000 and (counts - 1000).abs().max() < 130  # five standard deviations


def test_generative_replay_is_the_old_scholars_pairs_and_blocks_change_nothing():
    """differences.md, 17: each pair is used once, in the order drawn."""
    scholar = small_scholar()
    scholar.solver(torch.rand(16, 1, 32, 32))
    replay = generative_replay(scholar, block=10)
    torch.manual_seed(3)
    drawn = [replay.sample(n) for n in (4, 4, 4, 15)]
    torch.manual_seed(3)
    blocks = [(x, scholar.solver.answer(x)) for x in map(scholar.generator.sample, (10, 10, 15))]
    x, y = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    x_expected, y_expected = (torch.cat(parts)[: len(x)] for parts in zip(*blocks, strict=True))
    torch.testing.assert_close(x, x_expected)
    assert torch.equal(y, y_expected) and len(x.flatten(1).unique(dim=0)) == len(x)


def test_a_pool_is_drawn_once_and_replayed_evenly():
    """As pairs: whether the generator or the solver learns them, they are the same ones."""
    scholar = small_scholar()
    replay = generative_replay(scholar, block=8)
    replay.pool = 20
    torch.manual_seed(3)
    x, y = replay.sample(2000)
    rows, counts = x.flatten(1).unique(dim=0, return_counts=True)
    assert len(rows) == 20 and (counts - 100).abs().max() < 50  # five standard deviations
    torch.manual_seed(3)
    blocks = [scholar.generator.sample(8) for _ in range(3)]
    torch.testing.assert_close(rows, torch.cat(blocks)[:20].flatten(1).unique(dim=0))
    assert torch.equal(y, scholar.solver.answer(x))
    assert torch.equal(replay.inputs(300).flatten(1).unique(dim=0), rows)
    other = generative_replay(small_scholar())
    other.pool = 20
    other.set_extra_state(replay.get_extra_state())
    assert torch.equal(other.inputs(300).flatten(1).unique(dim=0), rows)


def test_lwf_replays_the_current_tasks_inputs_with_the_old_solvers_answers():
    scholar = small_scholar()
    replay = dgr.LwF(scholar, [Constant(0.1, 1)], dgr.Targets("soft", 2.0))
    replay.current = Constant(0.7, 5)
    x, y = replay.sample(4)
    assert torch.equal(x, replay.current.inputs(4)) and torch.equal(replay.inputs(4), x)
    torch.testing.assert_close(y, scholar.solver.answer_softly(x, 2.0))


def test_noise_replay_is_gaussian_with_the_statistics_of_the_images():
    """differences.md, 13."""
    x = dgr.NoiseReplay(small_scholar(), [Constant(0.2, 1), Constant(0.6, 1)], HARD).inputs(300)
    assert x.mean().item() == pytest.approx(0.4, abs=0.01) and x.std().item() == pytest.approx(0.2, abs=0.01)
    standard = (x - x.mean()) / x.std()  # Gaussian: no skew, kurtosis 3
    assert standard.pow(3).mean().item() == pytest.approx(0, abs=0.05)
    assert standard.pow(4).mean().item() == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("mode", [dgr.GenerativeReplay, dgr.NoiseReplay])
def test_replay_by_a_model_keeps_no_old_data(mode):
    task = Constant(0.5, 1)
    replay, alive = mode(small_scholar(), [task], HARD), weakref.ref(task)
    replay.sample(4)
    del task
    assert alive() is None


# -------------------------------------------------------------------------------------------------- importance


def test_importance_is_the_setting_or_one_over_the_task_and_one_for_the_first():
    """differences.md, 12."""
    for setting, expected in ((0.3, [1, 0.3, 0.3, 0.3]), ("auto", [1, 1 / 2, 1 / 3, 1 / 4])):
        assert [dgr.importance_of_new_task(setting, task) for task in (1, 2, 3, 4)] == expected


def test_auto_gives_every_task_the_same_share_of_the_generators_inputs():
    """differences.md, 12: with a constant r, old tasks get less and less."""
    share = [1.0]
    for task in (2, 3, 4, 5):
        r = dgr.importance_of_new_task("auto", task)
        share = [(1 - r) * old for old in share] + [r]
    assert share == pytest.approx([1 / 5] * 5)


def test_mixed_inputs_are_current_with_probability_r():
    """differences.md, 1."""
    sources = Constant(1.0, 0), Constant(0.0, 0)
    x = dgr.mixed_inputs(*sources, 0.3, 4000)
    assert x.shape == (4000, 1, 32, 32)
    assert x[:, 0, 0, 0].mean().item() == pytest.approx(0.3, abs=0.037)  # five standard deviations
    counts = {int(dgr.mixed_inputs(*sources, 0.3, 10)[:, 0, 0, 0].sum()) for _ in range(40)}
    assert len(counts) > 2  # each row is drawn for itself, the batch has no fixed share
    assert dgr.mixed_inputs(sources[0], None, 0.3, 5).min() == 1


# -------------------------------------------------------------------------------------------------- equation 1


def pairs(n: int) -> dgr.Pairs:
    return torch.rand(n, 1, 32, 32, dtype=torch.float64), torch.randint(10, (n,))


@pytest.mark.parametrize("r", [0.0, 0.3, 0.5, 1.0])
def test_solver_loss_equals_equation_1(r):
    """differences.md, 24."""
    solver = small_scholar().solver.double()
    current, replayed = pairs(5), pairs(7)
    loss = dgr.solver_loss(solver, current, replayed, r)
    expected = reference.equation_1(solver, *current, *replayed, r)
    torch.testing.assert_close(loss, expected)
    weights = list(solver.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights))


def test_solver_loss_without_replay_has_no_second_term():
    solver, (x, y) = small_scholar().solver.double(), pairs(5)
    expected = nn.functional.cross_entropy(solver(x), y)
    torch.testing.assert_close(dgr.solver_loss(solver, (x, y), None, 0.3), expected)


def test_solver_loss_takes_replayed_probabilities_at_their_temperature():
    """By hand: the square of the temperature restores the gradient's size."""
    solver, (x, y), (x_replayed, _) = small_scholar().solver.double(), pairs(5), pairs(7)
    soft = torch.rand(7, 10, dtype=torch.float64).softmax(dim=1)
    scores = solver(torch.cat([x, x_replayed]))
    replayed = -(soft * (scores[5:] / 3).log_softmax(dim=1)).sum(dim=1).mean()
    expected = 0.3 * nn.functional.cross_entropy(scores[:5], y) + 0.7 * 3**2 * replayed
    torch.testing.assert_close(dgr.solver_loss(solver, (x, y), (x_replayed, soft), 0.3, temperature=3.0), expected)


def test_learn_solver_passes_the_temperature_on():
    class Undecided(dgr.Solver):
        def update(self, loss, current, replayed):
            return {"loss": loss(current, replayed)}

    class Soft(Constant):
        def sample(self, n):
            return super().sample(n)[0], torch.full((n, 10), 0.1)

    solver, settings = Undecided(lambda x: torch.zeros(len(x), 10)), {"iterations": 1, "batch_size": 4}
    (losses,) = dgr.learn_solver(solver, Constant(0.1, 1), Soft(0.9, 2), r=0.0, temperature=3.0, **settings)
    assert losses["loss"].item() == pytest.approx(3**2 * math.log(10))


def test_real_and_replayed_images_go_through_the_solver_in_one_forward_pass():
    """differences.md, 8."""
    solver, seen = small_scholar().solver, []
    solver.net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    list(dgr.learn_solver(solver, Constant(0.1, 1), Constant(0.9, 2), r=0.5, iterations=2, batch_size=4))
    assert seen == [8, 8]


def test_learning_puts_networks_in_training_mode():
    scholar = small_scholar().eval()
    for part, learn in ((scholar.solver, dgr.learn_solver), (scholar.generator, dgr.learn_generator)):
        normalisation = next(layer for layer in part.net if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d))
        running = normalisation.running_mean.clone()
        list(learn(part, Constant(0.1, 1), None, r=1.0, iterations=1, batch_size=4))
        assert not torch.equal(normalisation.running_mean, running)


def test_generator_learns_a_mix_of_current_and_replayed_inputs():
    """differences.md, 1: in one batch, of the usual size."""
    generator, seen = small_scholar().generator, []
    generator.update = lambda inputs: seen.append(inputs()) or {}
    list(dgr.learn_generator(generator, Constant(1.0, 1), Constant(0.0, 2), r=0.5, iterations=9, batch_size=8))
    assert [len(x) for x in seen] == [8] * 9
    assert torch.cat(seen).unique().tolist() == [0, 1]


def test_learn_solver_is_adam_on_equation_1():
    """Two iterations of the program and of the reference leave the same weights."""
    scholar = small_scholar()
    solver, optimiser = reference.plain(scholar.solver.net, SMALL)
    current, replayed = Constant(0.1, 1), Constant(0.9, 2)
    for loss in list(dgr.learn_solver(scholar.solver, current, replayed, r=0.3, iterations=2, batch_size=4)):
        expected = reference.equation_1(solver, *current.sample(4), *replayed.sample(4), 0.3)
        torch.testing.assert_close(loss["loss"], expected.detach(), rtol=1e-4, atol=1e-5)
        optimiser.zero_grad()
        expected.backward()
        optimiser.step()
    for ours, theirs in zip(scholar.solver.net.parameters(), solver.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def learn_on_meta(mode: str, **parts) -> None:
    """Updates and what they need, on PyTorch's meta device: it has no numbers, so what waits for one fails."""
    with torch.device("meta"):
        images, labels = torch.zeros(20, 1, 32, 32, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64)
        split = data.Split(images, labels, permutation=torch.arange(1024))
    how = {"r": 0.5, "iterations": 3, "batch_size": 4}
    replay_mode = dgr.REPLAY_MODES[mode]
    for kind in replay_mode.target_kinds if replay_mode else ("none",):
        scholar = small_scholar(generator_conditional=kind == "own", **parts).to("meta")
        replay = replay_mode and replay_mode(scholar, [split, split], dgr.Targets(kind))
        if replay:
            replay.current = split
        list(dgr.learn_generator(scholar.generator, split, replay, **how))
        list(dgr.learn_solver(scholar.solver, split, replay, **how))


@pytest.mark.parametrize("solver", models.SOLVERS)
@pytest.mark.parametrize("generator", models.GENERATORS)
@pytest.mark.parametrize("mode", dgr.REPLAY_MODES)
def test_no_update_waits_for_the_device(mode, generator, solver):
    """The size of the mix, drawn on the CPU, is all that updates read."""
    learn_on_meta(mode, generator=generator, solver=solver)


def test_an_update_that_waits_for_the_device_is_found(monkeypatch):
    plain = models.step
    monkeypatch.setattr(models, "step", lambda optimiser, loss: loss.item() < 100 and plain(optimiser, loss))
    with pytest.raises(RuntimeError, match="meta tensors"):
        learn_on_meta("none")


@pytest.mark.parametrize(("pool", "distortion", "elastic"), [(0, 0.5, 0.0), (10, 0.5, 0.0), (10, 0.0, 2.0)])
@pytest.mark.parametrize("kind", ["hard", "soft", "own"])
def test_the_old_solver_answers_the_distorted_images_and_the_generator_learns_plain_ones(
    kind, pool, distortion, elastic, monkeypatch
):
    scholar = small_scholar(generator_conditional=True)
    scholar.generator.seen[:] = 1
    replay = dgr.GenerativeReplay(scholar, [], dgr.Targets(kind))
    replay.block, replay.pool, replay.distortion, replay.elastic = 8, pool, distortion, elastic
    monkeypatch.setattr(dgr, "distorted", lambda x, strength, elastic: x + 2 * strength + elastic)
    answered, plain = [], dgr.Targets.answers
    monkeypatch.setattr(dgr.Targets, "answers", lambda *given: answered.append(len(given[-1])) or plain(*given))
    x, y = replay.sample(6)
    assert answered == ([] if kind == "own" else [8, 8] * (pool > 0) + [6])  # without a pool, none twice
    assert x.min() >= 1 and replay.inputs(6).max() <= 1
    for sources in ((replay, None, 1.0), (Constant(0.5, 7), replay, 0.5)):  # a conditional generator, in a chain or not
        assert dgr.mixed_pairs(*sources, 6)[0].max() <= 1
    answers = replay.targets.answers(replay.old_scholar.solver, x)
    assert len(x) == len(y) == 6 and (kind == "own" or torch.equal(y, answers))
    monkeypatch.undo()
    assert len(replay.sample(0)[0]) == 0


def test_a_solver_learns_from_distorted_images_and_answers_plain_ones(monkeypatch):
    """The targets stay as they are. Without distortion, nothing is drawn."""
    monkeypatch.setattr(dgr, "distorted", lambda x, strength: (1 - strength / 2) * x)
    solver, plain, seen, x = small_scholar().solver, small_scholar().solver, [], torch.rand(8, 1, 32, 32)
    update, stream = solver.update, torch.get_rng_state()
    solver.update = lambda loss, *pairs: seen.append(pairs) or update(loss, *pairs)
    sources = Constant(0.25, 0), Constant(0.75, 1)
    for distortion, share in ((1.0, 2), (0.0, 1)):
        how = {"r": 0.5, "iterations": 1, "batch_size": 4, "distortion": distortion}
        list(dgr.learn_solver(solver, *sources, **how))
        for (inputs, targets), source in zip(seen.pop(), sources, strict=True):
            assert torch.equal(inputs, source.inputs(4) / share) and targets.tolist() == [source.label] * 4
        plain.load_state_dict(solver.state_dict())
        for each in (solver, solver.remember()):
            torch.testing.assert_close(each.answer_softly(x, 1.0), plain.answer_softly(x, 1.0))
    monkeypatch.undo()
    list(dgr.learn_solver(solver, *sources, **how))
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(solver.answer(x), solver.answer(x))


@pytest.mark.parametrize("changes", [{"distortion": 0.5}, {"elastic": 1.0}, {}])
def test_images_that_the_old_solver_answered_distorted_are_not_distorted_again(changes, monkeypatch):
    """In a chain, where they are all there is, or as what is replayed; real images are distorted beside them."""
    monkeypatch.setattr(dgr, "distorted", lambda x, strength, elastic=0.0: x + 2 * (strength > 0) + 4 * (elastic > 0))
    scholar, seen = small_scholar(), []
    replay = generative_replay(scholar)
    vars(replay).update(changes)
    scholar.solver.update = lambda loss, *pairs: seen.append(pairs) or {}
    moved = 2 * ("distortion" in changes) + 4 * ("elastic" in changes) or 2
    for sources in ((Constant(0.5, 1), replay), (replay, None)):
        list(dgr.learn_solver(scholar.solver, *sources, r=0.5, iterations=1, batch_size=4, distortion=1.0))
    ((real, _), (replayed, _)), ((chained, _), nothing) = seen
    assert torch.equal(real, torch.full_like(real, 2.5)) and nothing is None
    for x in (replayed, chained):
        assert x.min() >= moved and x.max() <= moved + 1


# ---------------------------------------------------------------------------------- an output layer per task, penalty


def two_headed(**changes) -> dgr.Solver:
    """A solver that has learned task 1 of three, and is about to learn task 2."""
    solver = models.make_scholar(1, 10, replace(SMALL, heads="task", **changes), tasks=3).solver
    solver.begin_task(2, replays=True)
    return solver


def test_own_head_asks_one_head_alone():
    x, y = dgr.OwnHead(Constant(0.5, 7), head=1, heads=3).sample(2)
    assert x.shape == (2, 1, 32, 32) and y.tolist() == [[dgr.NO_TARGET, 7, dgr.NO_TARGET]] * 2


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_replay_teaches_the_old_heads_and_the_current_task_its_own(kind):
    solver, temperature = two_headed().double(), 2.0 if kind == "soft" else 1.0
    (x, labels), (x_replayed, _) = pairs(5), pairs(7)
    y_replayed = torch.randint(10, (7, 1)) if kind == "hard" else torch.rand(7, 1, 10).double().softmax(dim=2)
    scores = solver(torch.cat([x, x_replayed]))
    assert scores.shape == (12, 2, 10)
    old = y_replayed[:, 0]
    replayed = temperature**2 * nn.functional.cross_entropy(scores[5:, 0] / temperature, old)
    expected = 0.3 * nn.functional.cross_entropy(scores[:5, 1], labels) + 0.7 * replayed
    y = torch.stack([torch.full_like(labels, dgr.NO_TARGET), labels], dim=1)
    loss = dgr.solver_loss(solver, (x, y), (x_replayed, y_replayed), 0.3, temperature)
    torch.testing.assert_close(loss, expected)


def test_lwf_moves_the_shared_layers():
    """differences.md, 31: r = 0 leaves the old solver's answers as the only thing to learn."""
    scholar = dgr.Scholar(small_scholar().generator, two_headed(weight_decay=0.0))
    replay = make_replay(dgr.LwF, scholar, dgr.Targets("soft", 2.0))
    before, current = state(scholar.solver), dgr.OwnHead(replay.current, 1, 2)
    nn.init.normal_(scholar.solver.net[-1][0].weight)  # or answers and scores would be the same
    list(dgr.learn_solver(scholar.solver, current, replay, r=0.0, iterations=1, batch_size=4, temperature=2.0))
    shared = [name for name, _ in scholar.solver.net[:-1].named_parameters()]
    assert all(not torch.equal(scholar.solver.net.get_parameter(name), before[f"net.{name}"]) for name in shared)


def test_hard_and_soft_targets_of_the_same_classes_weigh_the_same():
    """differences.md, 27."""
    scores, y = torch.randn(6, 10), torch.randint(10, (6,))
    torch.testing.assert_close(dgr.loss(scores, y), dgr.loss(scores, nn.functional.one_hot(y, 10).float()))


@pytest.mark.parametrize("replays", [True, False])
def test_a_head_that_learns_nothing_stays_as_it_is(replays):
    """differences.md, 28: adam would move it by its weight decay, and by what is left of earlier gradients."""
    solver, current = two_headed(), dgr.OwnHead(Constant(0.1, 1), 1, 2)
    old = dgr.OwnHead(Constant(0.9, 2), 0, 1)
    list(dgr.learn_solver(solver, current, old, r=0.5, iterations=2, batch_size=4))
    solver.begin_task(2, replays=replays)
    before = [state(head) for head in solver.net[-1]]
    list(dgr.learn_solver(solver, current, old if replays else None, r=0.5, iterations=2, batch_size=4))
    moved = [not torch.equal(head.weight, kept["weight"]) for head, kept in zip(solver.net[-1], before, strict=True)]
    assert moved == [replays, True, False]


def test_old_solver_has_the_heads_learned_so_far_and_a_state_keeps_them():
    solver, other = two_headed(), two_headed()
    other.begin_task(3, replays=True)
    old = solver.remember()
    assert old.answer(torch.rand(4, 1, 32, 32)).shape == (4, 2)
    assert old.answer_softly(torch.rand(4, 1, 32, 32), 2.0).sum(dim=2).allclose(torch.ones(4, 2))
    other.load_state_dict(solver.state_dict())
    assert other.answer(torch.rand(4, 1, 32, 32)).shape == (4, 2)


class Images:
    """A source of the same images every time."""

    def __init__(self, x: torch.Tensor):
        self.x = x

    def inputs(self, n: int) -> torch.Tensor:
        return self.x[torch.arange(n) % len(self.x)]


def test_ewc_is_its_equation_with_anchors_that_stay(monkeypatch):
    """differences.md, 26 and 33."""
    solver, ewc, kept = small_scholar().solver.double(), dgr.EWC(50.0), []
    ewc.images = 6
    drawn, plain = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *given: drawn.append(plain(*given)) or drawn[-1])
    for task in range(2):
        x, drawn[:] = torch.rand(6, 1, 32, 32, dtype=torch.float64), []
        ewc.remember(solver, Images(x))
        classes = torch.cat(drawn).flatten()
        assert len(classes) == 6 and len(classes.unique()) > 1 and solver.training
        fisher = reference.fisher_information(solver.net.eval(), x, classes)
        solver.train()
        kept.append((fisher, [parameter.detach().clone() for parameter in solver.net.parameters()]))
        with torch.no_grad():  # learning goes on, in place
            for parameter in solver.parameters():
                parameter += 0.01 * (task + 1)
    expected = reference.elastic_penalty(list(solver.net.parameters()), kept, 50.0)
    assert expected > 0
    torch.testing.assert_close(ewc(solver), expected, check_dtype=False)
    weights = list(solver.parameters())
    torch.testing.assert_close(torch.autograd.grad(ewc(solver), weights), torch.autograd.grad(expected, weights))
    again = dgr.EWC(50.0)
    again.load_state_dict(ewc.state_dict())
    torch.testing.assert_close(again(solver), ewc(solver))


def test_a_penalty_is_added_to_equation_1_whatever_is_replayed():
    """differences.md, 33."""
    solver, current, replayed = small_scholar().solver.double(), pairs(5), pairs(7)
    for old in (None, replayed):
        plain = dgr.solver_loss(solver, current, old, 0.3)
        with_penalty = dgr.solver_loss(solver, current, old, 0.3, penalty=lambda _solver: torch.tensor(2.5))
        torch.testing.assert_close(with_penalty, plain + 2.5)


# -------------------------------------------------------------------------------------------- conditional generators

CONDITIONAL = {"generator_conditional": True}


@pytest.mark.parametrize("kind", ["wgan", "vae", "flow", "conv-flow"])
def test_a_conditional_generator_draws_the_classes_seen_equally_often(kind):
    generator = small_scholar(generator=kind, **CONDITIONAL).generator
    for label in (2, 7, 7, 7):  # one more often than the other
        list(dgr.learn_generator(generator, Constant(0.5, label), None, r=1.0, iterations=1, batch_size=4))
    z = generator.remember().noise(2000)
    size = 1024 if "flow" in kind else 5
    assert z.shape == (2000, size + 10) and torch.equal(z[:, size:].sum(dim=1), torch.ones(2000))
    counts = z[:, size:].sum(dim=0)
    assert counts.nonzero().flatten().tolist() == [2, 7] and abs(counts[2] - 1000) < 112  # five standard deviations


def test_own_targets_are_the_classes_that_the_images_were_drawn_for():
    scholar = small_scholar(**CONDITIONAL)
    scholar.generator.seen[:] = 1
    scholar.generator.net = nn.Sequential(nn.Linear(15, 1024, bias=False), nn.Unflatten(1, (1, 32, 32)))
    with torch.no_grad():
        scholar.generator.net[0].weight.zero_()
        scholar.generator.net[0].weight[0, 5:] = torch.arange(10)  # the first pixel shows the class
    replay = dgr.GenerativeReplay(scholar, [], dgr.Targets("own"))
    x, y = replay.sample(50)
    assert torch.equal(x[:, 0, 0, 0].long(), y) and len(y.unique()) > 5
    grid = scholar.generator.sample(12, torch.zeros(12, 5))
    assert grid[:, 0, 0, 0].tolist() == [*range(10), 0, 1]


def test_mixed_pairs_are_current_with_probability_r_and_classes_even_where_replay_is_soft():
    class Soft(Constant):
        def sample(self, n):
            x, y = super().sample(n)
            return x, 0.8 * nn.functional.one_hot(y, 10) + 0.02

    x, y = dgr.mixed_pairs(Constant(0.1, 1), Soft(0.9, 2), 0.3, 4000)
    assert torch.equal(x[:, 0, 0, 0] > 0.5, y == 2)
    assert (y == 1).float().mean().item() == pytest.approx(0.3, abs=0.037)  # five standard deviations
    assert dgr.mixed_pairs(Soft(0.9, 2), None, 1.0, 4)[1].tolist() == [2, 2, 2, 2]  # in a chain


# ----------------------------------------------------------------------------------------------- the modules

# What each module may import of ours: main -> train -> dgr <- models -> gan; utils, data and visual know no method.
MAY_IMPORT = {
    "dgr": set(),
    "gan": set(),
    "utils": set(),
    "data": {"utils"},
    "visual": {"utils"},
    "train": {"data", "dgr", "utils"},
    "models": {"dgr", "gan", "utils"},
    "main": {"data", "dgr", "models", "train", "utils", "visual"},
}


@pytest.mark.parametrize("module", sorted({path.stem for path in ROOT.glob("*.py")} - {"setup"}))
def test_imports_point_one_way(module):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            imported |= {name.partition(".")[0] for name in names}
    assert imported & MAY_IMPORT.keys() <= MAY_IMPORT[module]


def test_the_method_and_the_task_loop_load_no_matplotlib():
    program = "import sys, dgr, train; print([name for name in sys.modules if name.startswith('matplotlib')])"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == "[]\n", process.stderr
