"""The method: scholar, replay modes, importance and equation 1."""

import copy
import math
from dataclasses import replace

import pytest
import reference
import torch
from conftest import SMALL
from torch import nn

import dgr
import gan
import models
import train
import utils

HARD = dgr.Targets("hard")


def small_scholar(image_channels: int = 1) -> dgr.Scholar:
    return models.make_scholar(image_channels, 10, SMALL)


# Enough channels that the last convolutions of solver and critic are products of matrices, with batches of 8.
WIDE = replace(
    SMALL,
    solver_depth=5,
    solver_reducing_layers=3,
    solver_channel_size=256,
    generator_g_channel_size=16,
    generator_c_channel_size=16,
)


def generative_replay(scholar: dgr.Scholar, block: int = 512) -> dgr.GenerativeReplay:
    replay = dgr.GenerativeReplay(scholar, [Constant(0.5, 1)], HARD)
    replay.block = block
    return replay


class Constant:
    """A source whose images all have one value and one label."""

    def __init__(self, value: float, label: int):
        self.value, self.label = value, label

    def sample(self, n):
        return torch.full((n, 1, 32, 32), self.value), torch.full((n,), self.label)

    def inputs(self, n):
        return self.sample(n)[0]


def state(module: nn.Module) -> dict:
    return copy.deepcopy(module.state_dict())


def assert_same_state(module: nn.Module, expected: dict) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name]), name


# ------------------------------------------------------------------------------------------------- the scholar


def test_sampling_and_answering_leave_every_buffer_and_mode_as_they_were():
    """Trap 5: batch normalisation in training mode while sampling or answering."""
    scholar = small_scholar()
    before = state(scholar)
    scholar.solver.answer(scholar.generator.sample(6))
    assert_same_state(scholar, before)
    assert all(module.training for module in scholar.modules())


def test_answers_do_not_depend_on_the_rest_of_the_batch():
    """Trap 5: precision measured on batch statistics."""
    scholar = small_scholar()
    scholar.solver(torch.rand(16, 1, 32, 32))  # running statistics other than their start
    bright, dark = torch.rand(4, 1, 32, 32), torch.zeros(12, 1, 32, 32)
    scores = scholar.solver.eval()(bright)
    scholar.solver.train()
    assert torch.equal(scholar.solver.answer(torch.cat([bright, dark]))[:4], scores.argmax(dim=1))


def test_samples_from_given_noise_leave_the_random_stream_as_it_was():
    scholar = small_scholar()
    before = torch.get_rng_state()
    scholar.generator.sample(3, torch.zeros(3, 5))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_solver_answers_by_its_own_forward():
    class Negative(dgr.Solver):
        def forward(self, x):
            return -self.net(x)

    solver = Negative(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    x = torch.randn(5, 1, 2, 2)
    scores = solver(x)
    assert torch.equal(solver.answer(x), scores.argmax(dim=1))
    torch.testing.assert_close(solver.answer_softly(x, 2.0), (scores / 2).softmax(dim=1))


def test_a_network_of_ones_own_keeps_its_layout(monkeypatch):
    """In channels-last layout, `view` would fail behind a convolution."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 32 * 32, 10)

        def forward(self, x):
            return self.linear(self.convolution(x).view(len(x), -1))

    monkeypatch.setitem(models.SOLVERS, "own", lambda _channels, _classes, options: models.Classifier(Net(), options))
    solver = models.make_scholar(3, 10, replace(SMALL, solver="own")).solver
    assert solver.answer(torch.rand(4, 3, 32, 32)).shape == (4,)


def test_old_scholar_is_generator_and_solver_alone():
    """No critic, no optimiser, no gradients, evaluation mode."""
    scholar = small_scholar()
    old = scholar.remember()
    assert not hasattr(old.generator, "critic")
    assert not any(isinstance(value, torch.optim.Optimizer) for m in old.modules() for value in vars(m).values())
    assert not any(parameter.requires_grad for parameter in old.parameters())
    assert not any(module.training for module in (*old.generator.net.modules(), *old.solver.net.modules()))


@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-4), (torch.bfloat16, 2e-2)])
def test_old_scholar_draws_and_answers_as_the_scholar_does(dtype, bound):
    """Batch normalisation folded into convolutions, or not: the same function, whatever its statistics."""
    scholar = models.make_scholar(1, 10, SMALL, compute_dtype=dtype)
    for layer in (layer for layer in scholar.modules() if isinstance(layer, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(layer.weight, 0.5, 2)
        torch.nn.init.normal_(layer.bias)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    old = scholar.remember()
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in old.solver.modules())
    z = torch.randn(50, SMALL.generator_z_size)
    x = scholar.generator.sample(50, z)
    assert relative_error(old.generator.sample(50, z), x) < bound
    with dgr.answering(scholar.solver):
        assert relative_error(old.solver(x), scholar.solver(x)) < bound
    assert old.generator.noise(2).dtype == torch.float32


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_old_scholar_does_not_learn_with_the_new_one():
    scholar = small_scholar()
    replay = generative_replay(scholar)
    before = state(replay.old_scholar)
    for _ in dgr.learn_generator(scholar.generator, Constant(0.1, 2), replay, r=0.5, iterations=2, batch_size=4):
        pass
    for _ in dgr.learn_solver(scholar.solver, Constant(0.1, 2), replay, r=0.5, iterations=2, batch_size=4):
        pass
    assert_same_state(replay.old_scholar, before)


def test_learning_records_no_graph_through_the_old_scholar():
    """Trap 4: back-propagation through the old scholar."""
    replay = dgr.GenerativeReplay(small_scholar(), [Constant(0.2, 1)], dgr.Targets("soft"))
    replay.old_scholar.requires_grad_(True)  # as if its freezing had been forgotten
    images, probabilities = replay.sample(4)
    assert not images.requires_grad and not probabilities.requires_grad


# ------------------------------------------------------------------------------------------------ replay modes


@pytest.mark.parametrize("mode", dgr.REPLAY_MODES)
def test_modes_sample_pairs(mode):
    replay = dgr.REPLAY_MODES[mode](small_scholar(), [Constant(0.2, 1), Constant(0.4, 2)], HARD)
    x, y = replay.sample(6)
    assert x.shape[1:] == (1, 32, 32) and x.dtype == torch.float32
    assert len(x) == len(y) == (0 if mode == "none" else 6)


def test_no_replay_is_empty():
    x, y = dgr.NoReplay(small_scholar(), [Constant(0.2, 1)], HARD).sample(32)
    assert x.shape == (0, 1, 32, 32) and y.shape == (0,)


def test_exact_replay_draws_each_old_task_equally_often():
    tasks = [Constant(0.1, 1), Constant(0.2, 2), Constant(0.3, 3)]
    x, y = dgr.ExactReplay(small_scholar(), tasks, dgr.Targets("true")).sample(3000)
    assert torch.allclose(x[:, 0, 0, 0] * 10, y.float())  # images keep their own labels
    counts = torch.bincount(y)[1:]
    assert counts.sum() == 3000 and (counts - 1000).abs().max() < 130  # five standard deviations


def test_generative_replay_is_the_old_scholars_pairs():
    """Images of the old generator, each with the old solver's answer; blocks change nothing."""
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
    assert torch.equal(y, scholar.solver.answer(x)) and torch.equal(y, y_expected)


@pytest.mark.parametrize("mode", ["generative-replay", "noise-replay", "exact-replay"])
def test_inputs_for_the_generator_are_the_modes_without_a_search_for_answers(mode, monkeypatch):
    replay = dgr.REPLAY_MODES[mode](small_scholar(), [Constant(0.2, 1), Constant(0.4, 2)], HARD)
    torch.manual_seed(3)
    x, _ = replay.sample(6)
    monkeypatch.setattr(dgr.Targets, "of", None)
    torch.manual_seed(3)
    assert torch.equal(replay.inputs(6), x)


def test_generative_replay_hands_out_no_pair_twice():
    replay = generative_replay(small_scholar(), block=16)
    x = torch.cat([replay.sample(8)[0] for _ in range(6)])
    assert len(x.flatten(1).unique(dim=0)) == 48


# -------------------------------------------------------------------------------------------------- importance


def test_importance_of_the_first_task_is_one():
    assert dgr.importance_of_new_task(0.3, 1) == dgr.importance_of_new_task("auto", 1) == 1


def test_importance_is_the_setting_or_one_over_the_task():
    assert [dgr.importance_of_new_task(0.3, task) for task in (2, 5)] == [0.3, 0.3]
    assert [dgr.importance_of_new_task("auto", task) for task in (2, 4, 5)] == [1 / 2, 1 / 4, 1 / 5]


def test_auto_gives_every_task_the_same_share_of_the_generators_inputs():
    """Trap 9: with r constant, old tasks get less and less; with auto, equal parts stay equal."""
    share = [1.0]
    for task in (2, 3, 4, 5):
        r = dgr.importance_of_new_task("auto", task)
        share = [(1 - r) * old for old in share] + [r]
    assert share == pytest.approx([1 / 5] * 5)


def test_mixed_inputs_are_current_with_probability_r():
    sources = Constant(1.0, 0), Constant(0.0, 0)
    x = dgr.mixed_inputs(*sources, 0.3, 4000)
    assert x.shape == (4000, 1, 32, 32)
    assert x[:, 0, 0, 0].mean().item() == pytest.approx(0.3, abs=0.037)  # five standard deviations
    counts = {int(dgr.mixed_inputs(*sources, 0.3, 10)[:, 0, 0, 0].sum()) for _ in range(40)}
    assert len(counts) > 2  # each row for itself, not a fixed part of the batch


def test_mixed_inputs_without_replay_are_current():
    assert dgr.mixed_inputs(Constant(1.0, 0), None, 1.0, 5).min() == 1


# -------------------------------------------------------------------------------------------------- equation 1


def pairs(n: int) -> dgr.Pairs:
    return torch.rand(n, 1, 32, 32, dtype=torch.float64), torch.randint(10, (n,))


@pytest.mark.parametrize("r", [0.0, 0.3, 0.5, 1.0])
def test_solver_loss_equals_equation_1(r):
    solver = small_scholar().solver.double()
    current, replayed = pairs(5), pairs(7)
    loss = dgr.solver_loss(solver, current, replayed, r)
    expected = reference.equation_1(solver, *current, *replayed, r)
    torch.testing.assert_close(loss, expected)
    weights = list(solver.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights))


def smooth(net):
    """Without ReLUs: where rounding turns the sign of what one sees, its gradient is another, in plain PyTorch too."""
    for place, layer in enumerate(net):
        if isinstance(layer, nn.ReLU):
            net[place] = nn.Softplus()


# In bf16: see benchmarks/README.md.
@pytest.mark.parametrize(("dtype", "bound", "gradients_bound"), [(None, 1e-4, 1e-4), (torch.bfloat16, 1e-2, 0.1)])
@pytest.mark.parametrize("part", ["solver", "generator"])
def test_losses_in_each_precision_are_close_to_the_reference(part, dtype, bound, gradients_bound):
    """Value and gradient."""
    scholar = models.make_scholar(1, 10, WIDE, compute_dtype=dtype)
    own = getattr(scholar, part)
    smooth(own.net)
    net, _ = reference.plain(own.net, WIDE)
    critic, _ = reference.plain(scholar.generator.critic, WIDE)
    for plain in (net.double(), critic.double()):
        plain.compute_dtype = None
    if part == "solver":
        current, replayed = ((torch.rand(8, 1, 32, 32), torch.randint(10, (8,))) for _ in range(2))
        loss = dgr.solver_loss(own, current, replayed, 0.3)
        expected = reference.equation_1(net, current[0].double(), current[1], replayed[0].double(), replayed[1], 0.3)
    else:
        z = own.noise(16)
        loss = gan.generator_loss(own.critic, own.net(z))
        expected = -critic(net(z.double())).mean()
    assert relative_error(loss, expected) < bound
    gradients = (torch.autograd.grad(of, [*n.parameters()]) for of, n in ((loss, own.net), (expected, net)))
    assert relative_error(*(torch.cat([each.flatten() for each in of]) for of in gradients)) < gradients_bound


def test_solver_loss_without_replay_has_no_second_term():
    solver = small_scholar().solver.double()
    (x, y), nothing = pairs(5), (torch.zeros(0, 1, 32, 32, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    expected = nn.functional.cross_entropy(solver(x), y)
    torch.testing.assert_close(dgr.solver_loss(solver, (x, y), nothing, 0.3), expected)


def test_solver_loss_takes_replayed_probabilities_at_their_temperature():
    solver, (x, y), (x_replayed, _) = small_scholar().solver.double(), pairs(5), pairs(7)
    soft, cross_entropy = torch.rand(7, 10, dtype=torch.float64).softmax(dim=1), nn.functional.cross_entropy
    scores = solver(torch.cat([x, x_replayed]))
    expected = 0.3 * cross_entropy(scores[:5], y) + 0.7 * 9 * cross_entropy(scores[5:] / 3, soft)
    torch.testing.assert_close(dgr.solver_loss(solver, (x, y), (x_replayed, soft), 0.3, temperature=3.0), expected)


def test_learn_solver_hands_the_temperature_on():
    class Soft(Constant):
        def sample(self, n):
            return super().sample(n)[0], torch.full((n, 10), 0.1)

    scholar = small_scholar()
    how = {"r": 0.0, "iterations": 1, "batch_size": 4}
    losses = {}
    for temperature in (1.0, 100.0):
        solver = copy.deepcopy(scholar).solver
        (told,) = dgr.learn_solver(solver, Constant(0.1, 1), Soft(0.9, 2), temperature=temperature, **how)
        losses[temperature] = told["loss"].item()
    assert losses[100.0] == pytest.approx(100**2 * math.log(10), rel=1e-3)  # scores / 100: all classes alike
    assert losses[1.0] < 10


def test_real_and_replayed_images_go_through_the_solver_in_one_forward():
    """Trap 6: in two forwards, batch normalisation normalises each kind apart."""
    solver, seen = small_scholar().solver, []
    solver.net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for _ in dgr.learn_solver(solver, Constant(0.1, 1), Constant(0.9, 2), r=0.5, iterations=2, batch_size=4):
        pass
    assert seen == [8, 8]


def test_learning_puts_networks_in_training_mode():
    scholar = small_scholar().eval()
    for part, learn in ((scholar.solver, dgr.learn_solver), (scholar.generator, dgr.learn_generator)):
        normalisation = next(layer for layer in part.net if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d))
        running = normalisation.running_mean.clone()
        for _ in learn(part, Constant(0.1, 1), None, r=1.0, iterations=1, batch_size=4):
            pass
        assert not torch.equal(normalisation.running_mean, running)


def test_generator_learns_a_mix_of_current_and_replayed_inputs():
    scholar, seen = small_scholar(), []
    scholar.generator.update = lambda inputs: seen.append(inputs()) or {}
    list(dgr.learn_generator(scholar.generator, Constant(1.0, 1), Constant(0.0, 2), r=0.5, iterations=9, batch_size=8))
    assert [len(x) for x in seen] == [8] * 9
    assert torch.cat(seen).unique().tolist() == [0, 1]


def test_learn_solver_is_adam_on_equation_1():
    """Two iterations of the program and of the plain reference leave the same weights."""
    scholar = small_scholar()
    solver, optimiser = reference.plain(scholar.solver.net, SMALL)
    current, replayed = Constant(0.1, 1), Constant(0.9, 2)
    losses = list(dgr.learn_solver(scholar.solver, current, replayed, r=0.3, iterations=2, batch_size=4))
    for loss in losses:
        expected = reference.equation_1(solver, *current.sample(4), *replayed.sample(4), 0.3)
        torch.testing.assert_close(loss["loss"], expected.detach(), rtol=1e-4, atol=1e-5)
        optimiser.zero_grad()
        expected.backward()
        optimiser.step()
    for ours, theirs in zip(scholar.solver.net.parameters(), solver.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_no_update_waits_for_a_number():
    """Losses stay where they are: the size of the mix, drawn on the CPU, is all that an update reads of a tensor."""

    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    scholar = small_scholar()
    how = {"r": 0.5, "iterations": 5, "batch_size": 4}
    for part, learn, expected in (("generator", dgr.learn_generator, 5), ("solver", dgr.learn_solver, 0)):
        updates = learn(getattr(scholar, part), Constant(0.1, 1), generative_replay(scholar), **how)
        with Reads() as reads:
            list(updates)
        assert reads.count == expected * SMALL.generator_c_updates_per_g_update


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_updates_are_repeatable_on_two_threads(dtype):
    """Bit for bit."""
    threads, states = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        for _ in range(2):
            torch.manual_seed(1)
            scholar = models.make_scholar(1, 10, WIDE, compute_dtype=dtype)
            current, how = Constant(0.1, 1), {"r": 0.5, "iterations": 3, "batch_size": 8}
            list(dgr.learn_generator(scholar.generator, current, generative_replay(scholar), **how))
            list(dgr.learn_solver(scholar.solver, current, generative_replay(scholar), **how))
            states.append(state(scholar))
    finally:
        torch.set_num_threads(threads)
    assert_same_state(scholar, states[0])


# ------------------------------------------------------------------------------------------- generator and CNN


def test_every_weight_is_initialised_by_one_rule_whatever_its_layer_is_called():
    """Trap 8: names of layers that pick what is initialised, so that the solver is never touched.

    The rule is PyTorch's: uniform with standard deviation 1 / sqrt(3 * inputs of a unit).
    """
    options = models.ScholarOptions(generator_c_channel_size=16, generator_g_channel_size=16, solver_channel_size=64)
    scholar = models.make_scholar(1, 10, options)
    layers = [m for m in scholar.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    assert len(layers) == 5 + 5 + 5  # generator, critic, solver
    for layer in layers:
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.2), layer


def test_optimisers_hold_every_parameter_of_their_network_once():
    scholar = small_scholar()
    generator, solver = scholar.generator, scholar.solver
    for network, optimiser in (
        (generator.net, generator.optimiser),
        (generator.critic, generator.critic_optimiser),
        (solver.net, solver.optimiser),
    ):
        held = [p for group in optimiser.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in network.parameters()}
        for group in optimiser.param_groups:
            assert group["lr"] == SMALL.lr and group["betas"] == (SMALL.beta1, SMALL.beta2)
            assert group["weight_decay"] == SMALL.weight_decay


def test_a_scheduler_is_kept_beside_its_optimiser():
    scholar = small_scholar()
    scheduler = scholar.generator.scheduler = torch.optim.lr_scheduler.StepLR(scholar.generator.optimiser, 1)
    assert train.optimisers_of(scholar)["generator.scheduler"] is scheduler


@pytest.mark.parametrize("depth, reducing_layers, size", [(5, 3, 4), (5, 4, 2), (2, 0, 32), (4, 1, 16), (6, 5, 1)])
def test_solver_depth_and_reducing_layers(depth, reducing_layers, size):
    options = models.ScholarOptions(solver_depth=depth, solver_reducing_layers=reducing_layers, solver_channel_size=32)
    solver = models.CNN(3, 10, options)
    convolutions = [layer for layer in solver.net if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [32 // 2**k for k in reversed(range(depth - 1))]
    assert [c.stride[0] for c in convolutions] == [1] * (depth - 1 - reducing_layers) + [2] * reducing_layers
    assert solver.net[-1].in_features == 32 * size * size
    assert solver(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_bfloat16_network_is_close_and_answers_in_float32():
    net = small_scholar().generator.net.eval()
    z = torch.randn(4, 5)
    exact = net(z)
    net.compute_dtype = torch.bfloat16
    assert net(z).dtype == torch.float32
    torch.testing.assert_close(net(z), exact, rtol=0.05, atol=0.02)
    assert isinstance(net, gan.Network) and copy.deepcopy(net).compute_dtype is torch.bfloat16


# ------------------------------------------------------------------------------------------------- the arms


def test_exact_replay_can_have_the_old_solvers_answers():
    scholar, tasks = small_scholar(), [Constant(0.1, 1), Constant(0.9, 2)]
    x, y = dgr.ExactReplay(scholar, tasks, HARD).sample(20)
    assert torch.equal(y, scholar.solver.answer(x))


def test_noise_replay_is_gaussian_noise_with_the_old_solvers_answers():
    scholar = small_scholar()
    x, y = dgr.NoiseReplay(scholar, [Constant(0.2, 1), Constant(0.6, 1)], HARD).sample(300)
    assert x.shape == (300, 1, 32, 32)
    assert x.mean().item() == pytest.approx(0.4, abs=0.01) and x.std().item() == pytest.approx(0.2, abs=0.01)
    standard = (x - x.mean()) / x.std()  # of gaussian noise: no skew, and the kurtosis of 3
    assert standard.pow(3).mean().item() == pytest.approx(0, abs=0.05)
    assert standard.pow(4).mean().item() == pytest.approx(3, abs=0.1)
    assert torch.equal(y, scholar.solver.answer(x))


@pytest.mark.parametrize("mode", ["exact-replay", "generative-replay", "noise-replay"])
def test_soft_targets_are_the_old_solvers_probabilities(mode):
    scholar = small_scholar()
    replay = dgr.REPLAY_MODES[mode](scholar, [Constant(0.5, 1)], dgr.Targets("soft", temperature=2.0))
    x, y = replay.sample(6)
    scores = scholar.remember().solver(x)
    torch.testing.assert_close(y, torch.softmax(scores / 2, dim=1), rtol=1e-4, atol=1e-6)
    assert not y.requires_grad


def test_soft_loss_is_cross_entropy_at_the_temperature():
    scores, y = torch.randn(5, 10, dtype=torch.float64), torch.softmax(torch.randn(5, 10, dtype=torch.float64), dim=1)
    expected = sum(-9 * (y[i] * torch.log_softmax(scores[i] / 3, dim=0)).sum() for i in range(5)) / 5
    torch.testing.assert_close(dgr.loss(scores, y, temperature=3.0), expected)


def test_old_scholar_keeps_no_old_data():
    """Generative replay has the old scholar and nothing of the tasks it is told of."""
    replay = generative_replay(small_scholar())
    replay.sample(4)
    assert not any(isinstance(value, list | Constant) for value in vars(replay).values())


# ------------------------------------------------------------------------------------------ another generator


def test_vae_learns_and_is_remembered_like_any_generator():
    """The interface needs nothing of WGAN-GP: a network from noise to images, and how it learns."""
    vae = models.make_scholar(1, 10, replace(SMALL, generator="vae")).generator
    bars = torch.zeros(8, 1, 32, 32)
    bars[:, :, 10:20] = 1
    losses = [vae.update(lambda: bars) for _ in range(60)]
    total = [sum(map(float, step.values())) for step in losses]
    assert total[-1] < total[0] / 2
    old = vae.remember()
    assert old.sample(3).shape == (3, 1, 32, 32) and not hasattr(old, "encoder")


def test_vae_loss_is_the_negative_evidence_lower_bound():
    """By hand, a mean over images: -log p(x|z) + KL(q(z|x) || N(0, 1))."""
    vae = models.make_scholar(1, 10, replace(SMALL, generator="vae")).double().generator
    x = torch.rand(3, 1, 32, 32, dtype=torch.float64)
    mean, log_variance = vae.encoder(x).chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    divergence = torch.distributions.kl_divergence(posterior, prior).sum() / 3
    torch.manual_seed(1)
    pixels = vae.net(mean + posterior.stddev * vae.noise(3))
    likelihood = (x * pixels.log() + (1 - x) * (1 - pixels).log()).sum() / 3
    torch.manual_seed(1)
    losses = vae.update(lambda: x)
    torch.testing.assert_close(losses["reconstruction"], -likelihood.detach())
    torch.testing.assert_close(losses["divergence"], divergence.detach())


# ------------------------------------------------------------------------------------------------ CUDA graphs


def losses_of_updates(scholar, device, times):
    """All losses of so many updates of generator and solver, one after another."""
    torch.manual_seed(1)
    x, y = torch.rand(64, 1, 32, 32, device=device), torch.randint(10, (64,), device=device)
    current, replayed = Rows(x[:32], y[:32]), Rows(x[32:], y[32:])
    how = {"r": 0.3, "iterations": times, "batch_size": 8}
    updates = [*dgr.learn_generator(scholar.generator, current, replayed, **how)]
    updates += dgr.learn_solver(scholar.solver, current, replayed, **how)
    return torch.stack([loss for losses in updates for loss in losses.values()])


def losses_in_step(first, second, device, times):
    """All losses of so many updates of two scholars, the second one put where the first is after each.

    And how far apart their steps were at most, in lengths of the first one's: 1 if one is left out or made twice.
    """
    how = {"r": 0.3, "iterations": times, "batch_size": 8}
    x, y = torch.rand(64, 1, 32, 32, device=device), torch.randint(10, (64,), device=device)
    losses, apart = ([], []), 0.0
    for part, learn in (("generator", dgr.learn_generator), ("solver", dgr.learn_solver)):
        updates = [
            learn(getattr(each, part), Rows(x[:32], y[:32]), Rows(x[32:], y[32:]), **how) for each in (first, second)
        ]
        for number in range(times):
            before = weights_by_optimiser(first)
            for own, update in zip(losses, updates, strict=True):
                torch.manual_seed(number)
                own.extend(next(update).values())
            for start, mine, yours in zip(before, *map(weights_by_optimiser, (first, second)), strict=True):
                length = (mine - start).norm().clamp(min=1e-30)  # of networks whose turn it is not, it is 0
                apart = max(apart, ((yours - mine).norm() / length).item())
            put_where(second, first)
    return *(torch.stack(own) for own in losses), apart


def weights_by_optimiser(scholar):
    """What each optimiser moves, as one vector: the generator's, the critic's and the solver's weights."""
    parameters = [adam.param_groups[0]["params"] for adam in train.optimisers_of(scholar).values()]
    return [torch.cat([weight.detach().flatten() for weight in each]) for each in parameters]


def put_where(scholar, other):
    """Give a scholar the weights and the optimisers' state of another, in its own memory, which graphs know."""
    pairs = [*zip(scholar.state_dict().values(), other.state_dict().values(), strict=True)]
    optimisers = [train.optimisers_of(each).values() for each in (scholar, other)]
    for own, others in zip(*optimisers, strict=True):
        for group, others_group in zip(own.param_groups, others.param_groups, strict=True):
            for p, q in zip(group["params"], others_group["params"], strict=True):
                pairs += [(own.state[p][key], value) for key, value in others.state[q].items()]
    for kept, value in pairs:
        kept.copy_(value)


class Rows:
    """Pairs in the order they are kept in, from the first again after the last."""

    def __init__(self, x, y):
        self.x, self.y, self.next = x, y, 0

    def sample(self, n):
        rows = (torch.arange(n) + self.next) % len(self.x)
        self.next += n
        return self.x[rows], self.y[rows]

    def inputs(self, n):
        return self.sample(n)[0]


def scholars(options, device, **settings):
    """The same scholar twice: its updates as they are, and captured."""
    options = replace(options, generator_c_updates_per_g_update=2)
    plain = models.make_scholar(1, 10, options, **settings).to(device)
    captured = models.make_scholar(1, 10, replace(options, cuda_graphs=True), **settings).to(device)
    captured.load_state_dict(plain.state_dict())
    return plain, captured


@pytest.mark.parametrize("parts", [{}, {"generator": "vae", "solver": "mlp"}], ids=["wgan-cnn", "vae-mlp"])
def test_captured_updates_are_the_updates(parts, monkeypatch):
    """All but the recording itself, which is of GPUs: here, work that was recorded is done again from Python."""

    def record(_captured, work):
        values = {}

        def replay():
            for name, value in work().items():
                values.setdefault(name, torch.empty_like(value)).copy_(value)  # always the same tensors
            return values

        recorded.append(replay)
        return replay

    recorded = []
    monkeypatch.setattr(utils.Captured, "_aside", lambda _captured, work: work())
    monkeypatch.setattr(utils.Captured, "_record", record)
    plain, captured = scholars(replace(SMALL, **parts), "cpu")
    times = 10
    assert torch.equal(losses_of_updates(plain, "cpu", times), losses_of_updates(captured, "cpu", times))
    assert_same_state(captured, plain.state_dict())
    assert len(recorded) == len(captured.generator.functions_of_tensors) + 1
    eager, graphs, apart = losses_in_step(*scholars(replace(SMALL, **parts), "cpu"), "cpu", times)
    assert torch.equal(eager, graphs) and apart == 0
    del recorded[len(captured.generator.functions_of_tensors) + 1 :]
    some = Rows(torch.rand(4, 1, 32, 32), torch.arange(4))
    list(dgr.learn_solver(captured.solver, some, some, r=0.5, iterations=times, batch_size=8))
    assert len(recorded) == len(captured.generator.functions_of_tensors) + 2  # another r, another graph


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("parts", [{}, {"generator": "vae", "solver": "mlp"}], ids=["wgan-cnn", "vae-mlp"])
def test_captured_and_eager_updates_give_the_same_losses_on_a_gpu(parts, dtype, gpu, monkeypatch):
    """In step, because two trainings drift apart wherever a kernel rounds another way."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain, captured = scholars(replace(SMALL, **parts), gpu, compute_dtype=dtype)
    eager, graphs, apart = losses_in_step(plain, captured, gpu, 100)
    tolerance = 1e-3 if dtype is None else 5e-2
    torch.testing.assert_close(graphs, eager, rtol=tolerance, atol=tolerance)
    assert apart < 0.5
