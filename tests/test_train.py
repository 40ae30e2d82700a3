"""The task loop: what is learned from what, what is measured, what observers hear, and what a run leaves in files."""

import copy
import csv
import json
from dataclasses import replace

import pytest
import scipy.linalg
import torch
from conftest import SMALL, assert_same_state, small_scholar, state
from torch import nn

import data
import dgr
import models
import train
import utils

SETTINGS = {"generator_iterations": 5, "solver_iterations": 6, "batch_size": 4, "importance_of_new_task": 0.5}
SETTINGS |= {"test_size": 20, "eval_log_interval": 3, "loss_log_interval": 2, "checkpoint_interval": 1e9}
SETTINGS |= {"replay_targets": "hard", "temperature": 1.0}


def small_tasks(small_mnist, number: int = 2) -> list[data.Task]:
    library = data.Library(small_mnist, torch.device("cpu"), accept_unverified=True)
    return data.permutated_mnist(library, data.ExperimentOptions(mnist_permutation_number=number))


class Recorder(utils.Observer):
    image_interval = 3

    def __init__(self):
        self.events = []

    def begin(self, phase, task, iterations, done):
        self.events.append(("begin", phase, task, iterations))

    def scalars(self, phase, task, iteration, values):
        self.events += [("scalar", phase, task, iteration, name, value) for name, value in values.items()]

    def images(self, task, iteration, images):
        self.events.append(("images", task, iteration, len(images)))

    def named(self, *prefix):
        return [event[len(prefix) :] for event in self.events if event[: len(prefix)] == prefix]


def learn(small_mnist, new_scholar=small_scholar, tasks=2, save_scholar=lambda _: None, parts=None, **changes):
    """Learn small tasks. Returns the training when it is over, and what its observer heard."""
    recorder, noise = Recorder(), torch.zeros(2, 5)
    training = train.Training(
        new_scholar,
        small_tasks(small_mnist, tasks),
        train.TrainingOptions(**SETTINGS | changes),
        observers=[recorder],
        sample=lambda scholar: scholar.generator.sample(2, noise),
        save_scholar=save_scholar,
        **(parts or {}),
    )
    assert training.run()["precision"] is training.matrix
    return training, recorder


def watch_learning(monkeypatch) -> list[tuple]:
    """What every phase of learning is given: part, network, current, replay and the rest by name."""
    seen = []

    def watched(part, plain):
        def learn(network, current, replay, **how):
            seen.append((part, network, current, replay, how))
            return plain(network, current, replay, **how)

        return learn

    for part in ("generator", "solver"):
        monkeypatch.setattr(dgr, f"learn_{part}", watched(part, getattr(dgr, f"learn_{part}")))
    return seen


def test_precision_counts_right_answers_over_the_whole_split(small_mnist):
    """differences.md, 23."""

    class Nine(dgr.Solver):
        def forward(self, x):
            return torch.eye(10)[9].repeat(len(x), 1)  # right in the last row too, after the last whole batch

    assert train.precision(Nine(torch.nn.Identity()), small_tasks(small_mnist)[0].test, 7) == 0.1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_in_a_test_halves_the_block_and_goes_on(small_mnist, monkeypatch, error):
    blocks, plain = [], dgr.Solver.forward

    def forward(solver, x):
        if solver.training:
            return plain(solver, x)
        blocks.append(len(x))
        if len(x) > 16:
            raise error
        return plain(solver, x)

    torch.manual_seed(1)
    whole, _ = learn(small_mnist, replay_mode="none")
    torch.manual_seed(1)
    monkeypatch.setattr(dgr.Solver, "forward", forward)
    training, _ = learn(small_mnist, replay_mode="none")
    assert training.matrix == whole.matrix and training.images_at_once == 16
    assert [n for n in blocks if n > 16] == [64, 32]  # on whole tests; remembered from then on


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no such kernel")])
def test_what_smaller_blocks_do_not_help_ends_the_run(small_mnist, monkeypatch, error):
    def forward(_solver, x):
        raise error

    monkeypatch.setattr(dgr.Solver, "forward", forward)
    with pytest.raises(RuntimeError) as raised:
        learn(small_mnist, replay_mode="none")
    assert raised.value is error


def test_curves_are_measured_on_subsets_of_test_splits_and_the_summary_on_all_of_them(small_mnist, monkeypatch):
    """differences.md, 19."""
    seen = []
    plain = train.scores
    monkeypatch.setattr(train, "scores", lambda _, split, *at, **how: seen.append(split) or plain(_, split, *at, **how))
    training, _ = learn(small_mnist, tasks=3, replay_mode="none")
    tests = [task.test for task in training.tasks]
    whole = [split for split in seen if len(split) > 20]
    expected = [0, 1, 2, *(0, 1), *(0, 1, 2), *(0, 1, 2)]  # untrained; after each task, with the following one
    assert [id(split) for split in whole] == [id(tests[i]) for i in expected]
    (first, *_) = (split for split in seen if len(split) == 20)
    assert torch.equal(first.images, tests[0].subset(20).images)


def test_looking_does_not_change_what_is_learned(small_mnist):
    """differences.md, 9: whether precision is measured often or seldom, weights and buffers are the same."""
    scholars = []
    for interval in (1, 1000):
        torch.manual_seed(5)
        scholars.append(learn(small_mnist, eval_log_interval=interval, loss_log_interval=interval)[0].scholar)
    assert_same_state(scholars[0], scholars[1].state_dict())


def test_sample_grids_repeat_and_leave_the_random_stream_as_it_was():
    """differences.md, 9: for a generator that draws more than z, too."""

    class Diffusion(dgr.Generator):
        def sample(self, n, z=None):
            return super().sample(n, z) + torch.rand(n, 1, 1, 1)

    generator, before = Diffusion(small_scholar().generator.net, 5), torch.get_rng_state()
    first = models.sample_grid(generator, 2, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(models.sample_grid(generator, 2, seed=3), first)
    assert not torch.equal(models.sample_grid(generator, 2, seed=4), first)


def test_matrix_has_a_row_for_each_task_over_the_tasks_so_far(small_mnist):
    saved = []
    training, recorder = learn(small_mnist, tasks=3, save_scholar=lambda scholar: saved.append(scholar))
    assert [[value is not None for value in row] for row in training.matrix] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert saved == [training.scholar] * 3
    for task, row in enumerate(training.matrix, start=1):
        reported = [(6, f"precision-{old}", value) for old, value in enumerate(row, start=1) if value is not None]
        assert recorder.named("scalar", "test", task) == reported


def test_observers_hear_at_their_intervals_and_at_the_end(small_mnist):
    """Losses, precision on the tasks begun so far, and images."""
    _, recorder = learn(small_mnist)
    assert [i for i, name, _ in recorder.named("scalar", "generator", 1) if name == "critic-loss"] == [2, 4, 5]
    assert [i for i, name, _ in recorder.named("scalar", "solver", 2) if name == "loss"] == [2, 4, 6]
    assert recorder.named("images") == [(1, 3, 2), (1, 5, 2), (2, 3, 2), (2, 5, 2)]
    heard = [event[:3] for event in recorder.named("scalar", "solver") if event[2].startswith("precision")]
    expected = [(task, i, f"precision-{old}") for task in (1, 2) for i in (3, 6) for old in range(1, task + 1)]
    assert heard == expected


MATRIX = [[0.7, None, None], [0.9, 0.6, None], [0.8, 0.65, 1.0]]  # best in the middle; better at the end
CHAIN = [[0.9, None, None], [None, 0.7, None], [None, None, 0.6]]


@pytest.mark.parametrize(
    ("matrix", "average", "forgetting"),
    [(MATRIX, (0.8 + 0.65 + 1) / 3, (0.9 - 0.8 + 0.6 - 0.65) / 2), (CHAIN, 0.6, 0.3), ([[0.9]], 0.9, 0)],
    ids=["tasks", "chain", "one task"],
)
def test_average_precision_and_forgetting(matrix, average, forgetting):
    assert (train.average_precision(matrix), train.forgetting(matrix)) == pytest.approx((average, forgetting))


def test_measures_of_three_tasks_worked_out_by_hand():
    """docs/running.md has the formulas."""
    matrix = [[0.9, None, None], [0.92, 0.8, None], [0.5, 0.7, 0.95]]
    assert train.average_precision(matrix) == pytest.approx((0.5 + 0.7 + 0.95) / 3)
    assert train.forgetting(matrix) == pytest.approx(((0.92 - 0.5) + (0.8 - 0.7)) / 2)  # the task just learned counts
    assert train.backward_transfer(matrix) == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert train.incremental_average(matrix) == pytest.approx((0.9 + (0.92 + 0.8) / 2 + (0.5 + 0.7 + 0.95) / 3) / 3)
    assert train.forward_transfer([None, 0.2, 0.3], [0.15, 0.1, 0.05]) == pytest.approx(
        ((0.2 - 0.1) + (0.3 - 0.05)) / 2
    )


def test_a_wholly_forgotten_task_has_backward_transfer_minus_one():
    """differences.md, 22."""
    assert train.backward_transfer([[1.0, None], [0.0, 1.0]]) == -1


def test_transfer_is_not_measured_where_it_means_nothing(small_mnist):
    assert train.backward_transfer(CHAIN) is None and train.backward_transfer([[0.9]]) is None
    assert train.forward_transfer([None], [0.1]) is None
    training, _ = learn(small_mnist, chain=True)
    assert training.measures()["forward_transfer"] is None


def test_forward_transfer_is_measured_before_a_task_is_learned_and_on_an_untrained_solver(small_mnist, monkeypatch):
    untrained = small_scholar()
    scholar = copy.deepcopy(untrained)
    saved = []
    training, _ = learn(small_mnist, lambda: scholar, save_scholar=lambda s: saved.append(s.solver.remember()))
    test = training.tasks[1].test
    before, at_first = (train.precision(solver, test, 64) for solver in (saved[0], untrained.solver.remember()))
    assert training.ahead["before"][1] == before and training.ahead["untrained"][1] == at_first
    assert training.measures()["forward_transfer"] == before - at_first


def test_with_the_task_known_no_other_class_can_win():
    """differences.md, 21: all scores of the task's classes are negative; a class masked by a factor would have 0."""

    class Known(dgr.Solver):
        def forward(self, x):
            scores = torch.zeros(len(x), 10)
            scores[:, [2, 3]] = torch.tensor([-5.0, -1.0])
            return scores

    split = data.Split(torch.zeros(4, 1, 32, 32, dtype=torch.uint8), torch.tensor([2, 3, 3, 3]))
    assert train.precision(Known(torch.nn.Identity()), split, 3) == 0
    scores = train.scores(Known(torch.nn.Identity()), split, 3)
    assert train.share_right(scores, split.labels, torch.tensor([2, 3])) == 0.75


@pytest.mark.parametrize("chain", [False, True])
def test_task_incremental_precision_has_the_shape_of_the_matrix_and_is_no_lower(small_mnist, monkeypatch, chain):
    monkeypatch.setitem(globals(), "small_tasks", lambda *_: split_tasks(small_mnist))
    training, _ = learn(small_mnist, tasks=2, chain=chain)
    for row, known in zip(training.matrix, training.task_incremental, strict=True):
        assert [value is None for value in row] == [value is None for value in known]
        assert all(theirs >= ours for ours, theirs in zip(row, known, strict=True) if ours is not None)


def split_tasks(small_mnist) -> list[data.Task]:
    library = data.Library(small_mnist, torch.device("cpu"), accept_unverified=True)
    return data.EXPERIMENTS["split-mnist"].make_tasks(library, data.ExperimentOptions(mnist_split_number=2))


# ----------------------------------------------------------------------------------------- what is learned from what


def test_joint_learns_each_task_from_scratch_with_all_tasks_weighing_the_same(small_mnist, monkeypatch):
    scholars, seen = [], watch_learning(monkeypatch)
    settings = {"replay_mode": "joint", "replay_targets": "true", "importance_of_new_task": "auto"}
    learn(small_mnist, lambda: scholars.append(small_scholar()) or scholars[-1], tasks=3, **settings)
    assert [network for _, network, *_ in seen] == [scholar.solver for scholar in scholars] and len(scholars) == 3
    assert [how["r"] for *_, how in seen] == [1, 1 / 2, 1 / 3]
    assert all(isinstance(replay, dgr.ExactReplay) for _, _, _, replay, _ in seen[1:])


@pytest.mark.parametrize("mode", ["lwf", "generative-replay", "exact-replay", "none"])
def test_with_a_head_per_task_precision_is_that_of_the_tasks_own(small_mnist, monkeypatch, mode):
    monkeypatch.setitem(globals(), "small_tasks", lambda *_: split_tasks(small_mnist))

    def new_scholar():
        return models.make_scholar(1, 10, replace(SMALL, heads="task"), tasks=2)

    kinds = {"lwf": ("soft", 2.0), "exact-replay": ("true", 1.0)}
    targets, temperature = kinds.get(mode, ("hard", 1.0))
    settings = {"replay_mode": mode, "replay_targets": targets, "temperature": temperature, "heads": "task"}
    training, _ = learn(small_mnist, new_scholar, **settings)
    test = training.tasks[0].test
    x, y = test.batch(slice(None))
    scores = training.scholar.solver.remember()(x)
    assert training.matrix[1][0] == pytest.approx((scores[:, 0].argmax(dim=1) == y).float().mean().item())
    assert training.measures()["forward_transfer"] is None  # the next head has learned nothing yet


def test_generator_learns_only_where_it_is_asked_to(small_mnist):
    scholar = small_scholar()
    before = state(scholar.generator)
    _, recorder = learn(small_mnist, lambda: scholar, replay_mode="none")
    assert recorder.named("begin") == [("solver", 1, 6), ("solver", 2, 6)]
    assert_same_state(scholar.generator, before)
    _, recorder = learn(small_mnist, lambda: scholar, replay_mode="none", sample_log=True)
    assert [phase for phase, *_ in recorder.named("begin")] == ["generator", "solver"] * 2


@pytest.mark.parametrize("mode", [mode for mode, replay in dgr.REPLAY_MODES.items() if replay])
def test_replay_may_see_the_training_splits_of_all_tasks_before(small_mnist, monkeypatch, mode):
    seen, plain = [], dgr.REPLAY_MODES[mode]

    class Watched(plain):
        def __init__(self, old_scholar, old_tasks, targets):
            seen.append(list(old_tasks))
            super().__init__(old_scholar, old_tasks, targets)

    monkeypatch.setitem(dgr.REPLAY_MODES, mode, Watched)
    training, _ = learn(small_mnist, replay_mode=mode, tasks=3)
    splits = [id(task.train) for task in training.tasks]
    assert [[id(split) for split in old] for old in seen] == [splits[:1], splits[:2]]


def test_each_task_is_learned_from_its_training_split_and_the_last_scholar(small_mnist, monkeypatch):
    seen, ends = watch_learning(monkeypatch), []
    settings = {"importance_of_new_task": "auto", "replay_targets": "soft", "temperature": 3.0}
    settings["save_scholar"] = lambda scholar: ends.append(scholar.remember().state_dict())
    training, _ = learn(small_mnist, tasks=3, **settings)
    assert [part for part, *_ in seen] == ["generator", "solver"] * 3
    for (part, _, current, replay, how), task in zip(seen, (1, 1, 2, 2, 3, 3), strict=True):
        assert current is training.tasks[task - 1].train and how["r"] == 1 / task and how["batch_size"] == 4
        assert part == "generator" or how["temperature"] == 3.0
        assert (replay is None) == (task == 1)
        if replay is not None:
            assert_same_state(replay.old_scholar, ends[task - 2])


def test_scholars_of_a_chain_learn_from_scratch_and_from_the_last_one_alone(small_mnist, monkeypatch):
    scholars, seen = [], watch_learning(monkeypatch)
    training, _ = learn(small_mnist, lambda: scholars.append(small_scholar()) or scholars[-1], tasks=3, chain=True)
    parts = [part for scholar in scholars for part in (scholar.generator, scholar.solver)]
    assert [network for _, network, *_ in seen] == parts and len(scholars) == 3
    assert all(isinstance(current, data.Split) for _, _, current, *_ in seen[:2])
    for (_, _, current, replay, how), teacher in zip(seen[2:], [scholars[i] for i in (0, 0, 1, 1)], strict=True):
        assert isinstance(current, dgr.GenerativeReplay) and replay is None and how["r"] == 1
        assert_same_state(current.old_scholar, teacher.remember().state_dict())
    assert [[value is not None for value in row] for row in training.matrix] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_learning_rate_of_every_update(small_mnist, monkeypatch, kind):
    """Linear: from the full rate at the first update of a phase towards 0, reached one update after the last."""
    scholar, seen = small_scholar(), {"generator": [], "solver": []}
    for part, rates in seen.items():
        network = getattr(scholar, part)
        optimisers = list(train.optimisers(network).values())
        assert len(optimisers) == (2 if part == "generator" else 1)

        def update(*args, plain=network.update, optimisers=optimisers, rates=rates):
            rates.append({group["lr"] for optimiser in optimisers for group in optimiser.param_groups})
            return plain(*args)

        monkeypatch.setattr(network, "update", update)
    learn(small_mnist, lambda: scholar, lr_schedule=kind)
    for part, n in (("generator", 5), ("solver", 6)):
        left = [1.0 if kind == "constant" else 1 - i / n for i in range(n)]
        assert seen[part] == [{SMALL.lr * share} for share in left] * 2  # the second task starts again


def test_a_scheduler_is_kept_beside_its_optimiser():
    scholar = small_scholar()
    scheduler = scholar.generator.scheduler = torch.optim.lr_scheduler.StepLR(scholar.generator.optimiser, 1)
    assert train.optimisers(scholar)["generator.scheduler"] is scheduler


@pytest.mark.parametrize("loss_log_interval", [1, 100])
def test_diverged_training_stops_with_where_and_what_to_try(small_mnist, loss_log_interval):
    scholar = small_scholar()
    with torch.no_grad():
        scholar.solver.net[0].weight.fill_(float("nan"))
    with pytest.raises(utils.UserError, match=r"task 1, solver iteration \d.*--lr"):
        learn(small_mnist, lambda: scholar, loss_log_interval=loss_log_interval)


# ---------------------------------------------------------------------------------------------- files of a run


def test_metrics_are_on_disk_as_soon_as_they_are_reported(tmp_path):
    """differences.md, 20."""
    files = utils.RunFiles(tmp_path, {"a": 1})
    files.scalars("solver", 1, 30, {"loss": 0.1 + 0.2, "precision-1": 1.0})
    with (tmp_path / "metrics.csv").open() as file:  # not closed by the run yet
        header, *rows = csv.reader(file)
    assert header == ["phase", "task", "iteration", "name", "value"]
    start = ["solver", "1", "30"]
    assert rows == [[*start, "loss", "0.30000000000000004"], [*start, "precision-1", "1.0"]]
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


def test_summary_is_what_the_run_gives_and_its_seconds(tmp_path):
    written = utils.RunFiles(tmp_path, {}).write_summary(precision=[[0.5, None], [0.25, 1.0]], seed=3)
    assert json.loads((tmp_path / "summary.json").read_text()) == written
    assert written.pop("seconds") >= 0 and written == {"precision": [[0.5, None], [0.25, 1.0]], "seed": 3}


# -------------------------------------------------------------------------------------------- from a kept scholar


def test_the_first_task_after_a_kept_scholar_is_learned_from_its_replay(small_mnist, monkeypatch):
    seen, old = watch_learning(monkeypatch), small_scholar()
    before = train.Before(old, earlier=["one", "two"], given=0)
    learn(small_mnist, parts={"before": before}, importance_of_new_task="auto")
    (_, _, current, replay, how), later = seen[0], seen[2]
    assert how["r"] == 1 / 3 and later[4]["r"] == 1 / 4 and isinstance(current, data.Split)
    assert_same_state(replay.old_scholar, old.remember().state_dict())


def test_a_kept_scholar_answers_among_the_classes_it_knows_and_a_wider_one_starts_from_its_weights():
    old, wide = small_scholar(), models.make_scholar(1, 14, SMALL)
    fresh, x = state(wide), torch.rand(6, 1, 32, 32)
    models.inherit(wide, old.state_dict())
    head = [name for name, value in fresh.items() if len(value.shape) and len(value) == 14]
    assert len(head) == 2
    for name, value in old.state_dict().items():
        wider = wide.state_dict()[name]
        assert torch.equal(wider[:10] if name in head else wider, value), name
        assert name not in head or torch.equal(wider[10:], fresh[name][10:])
    expected = old.solver.answer_softly(x, 2.0)
    old.solver.net = models.among_more(old.solver.net, 4)
    softly = old.remember().solver.answer_softly(x, 2.0)
    torch.testing.assert_close(softly[:, :10], expected)
    assert softly.shape == (6, 14) and not softly[:, 10:].any() and old.solver.answer(x).max() < 10


@pytest.mark.parametrize("generator", models.GENERATORS)
def test_a_conditional_generator_draws_the_same_after_it_is_told_of_more_classes(generator):
    options = replace(SMALL, generator=generator, generator_conditional=True)
    old, wide = (models.make_scholar(1, classes, options) for classes in (3, 5))
    old.generator.seen[1:] = 1
    models.inherit(wide, old.state_dict())
    z, y = torch.randn(6, old.generator.z_size), torch.arange(6) % 3
    drawn = [each.sample(6, each.with_classes(z, y)) for each in (old.generator, wide.generator)]
    torch.testing.assert_close(*drawn)
    assert wide.generator.seen.tolist() == [0, 1, 1, 0, 0]
    assert set(wide.generator.sample_pairs(20)[1].tolist()) == {1, 2}


def test_forgetting_after_a_kept_scholar_leaves_out_what_was_not_measured():
    assert train.forgetting([[None] * 3, [0.9, 0.8, None], [0.7, 0.75, 0.6]]) == pytest.approx((0.2 + 0.05) / 2)


# ------------------------------------------------------------------------------------------ measures of a generator


def points_of_a_gaussian(mean, deviations, n=200):
    """Points (n, d), float64, with exactly this mean, these standard deviations, and no correlation."""
    x = torch.randn(n, len(mean)).double()
    return torch.tensor(mean) + torch.linalg.qr(x - x.mean(dim=0)).Q * (n - 1) ** 0.5 * torch.tensor(deviations)


def test_frechet_distance_of_gaussians_is_the_known_one():
    a, b = points_of_a_gaussian([0.0, 1, 2], [1.0, 2, 3]), points_of_a_gaussian([3.0, 1, 6], [2.0, 4, 3], n=150)
    assert train.frechet_distance(a, b) == pytest.approx(3**2 + 4**2 + 1**2 + 2**2)
    assert train.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_agrees_with_scipys_root_and_needs_no_inverse():
    a, b = torch.randn(90, 4).double() @ torch.randn(4, 4).double(), torch.randn(80, 4).double()
    both = [torch.cov(x.T).numpy() for x in (a, b)]
    root = scipy.linalg.sqrtm(both[0] @ both[1]).real
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + (both[0] + both[1] - 2 * root).trace()
    assert train.frechet_distance(a, b) == pytest.approx(expected)
    dead = [nn.functional.pad(x, (0, 2)) for x in (a, b)]  # two features that are always 0
    assert train.frechet_distance(*dead) == pytest.approx(expected)


def test_precision_is_what_is_drawn_among_the_real_and_recall_what_is_real_among_the_drawn():
    grid = torch.arange(10.0).double()[:, None]
    real = torch.cat([grid, grid + 100])
    for block in (3, 1000):
        assert train.precision_and_recall(real, grid + 0.5, block=block) == (1.0, 0.5)
        assert train.precision_and_recall(real, torch.cat([grid, grid + 300]), block=block) == (0.5, 0.5)
    # The second nearest of 0, 1, 2 are 2, 1 and 2 away; the third nearest does not exist.
    assert train.precision_and_recall(grid[:3], torch.tensor([[-3.0], [4.0]]).double(), k=2) == (0.5, 1.0)


def test_repeated_points_are_among_themselves():
    """differences.md, 30: a radius of 0 has nothing strictly inside. Copies that differ by rounding are copies too."""
    points = 30 * torch.randn(20, 128).double().repeat(5, 1)
    assert train.precision_and_recall(points, points) == (1.0, 1.0)
    assert train.precision_and_recall(points, points * (1 + 1e-7)) == (1.0, 1.0)
    assert train.precision_and_recall(points, points + 1) == (0.0, 0.0)


def test_a_classifier_measures_in_evaluation_mode_even_if_left_in_training_mode():
    """differences.md, 29."""
    classifier, x = models.classifier_network(1, 32, 10).train(), torch.rand(6, 1, 32, 32)
    before = state(classifier)
    together, _ = train.features(classifier, x, 6)
    alone, _ = train.features(classifier, x, 1)
    assert torch.allclose(together, alone, atol=1e-5)
    assert_same_state(classifier, before)


class Stored(nn.Module):
    """A generator's network that draws stored images."""

    def __init__(self, images):
        super().__init__()
        self.images = nn.Parameter(images)

    def forward(self, z):
        return self.images[torch.randint(len(self.images), (len(z),))]


@pytest.fixture(scope="module")
def classifier(small_mnist, tmp_path_factory):
    return models.load_classifier([task.train for task in small_tasks(small_mnist, 1)], tmp_path_factory.mktemp("kept"))


def measure(small_mnist, images, classifier, **changes):
    """The measures of a scholar that draws these images and answers as the classifier does."""
    scholar = dgr.Scholar(dgr.Generator(Stored(images), 5), dgr.Solver(classifier))
    options = train.TrainingOptions(
        **SETTINGS | {"solver_iterations": 60, "batch_size": 20, "measured_images": 100} | changes
    )
    new_scholar = lambda: small_scholar(lr=1e-2)  # noqa: E731
    return train.measure_generator(scholar, small_tasks(small_mnist, 1), classifier, new_scholar, options)


def test_measures_tell_real_images_from_those_of_one_class(small_mnist, classifier):
    train_split = small_tasks(small_mnist)[0].train
    every = measure(small_mnist, train_split.batch(slice(None))[0], classifier)
    one = measure(small_mnist, train_split.take(train_split.labels == 3).batch(slice(None))[0], classifier)
    assert every["classifier_precision"] == every["label_agreement"] == 1
    assert one["class_share"] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0] and min(every["class_share"]) > 0
    assert sum(every["class_share"]) == pytest.approx(1)
    assert every["frechet_distance"] < one["frechet_distance"] / 5
    assert every["generator_recall"] > 0.5 > 0.2 > one["generator_recall"]
    assert every["fitting_capacity"] > 0.9 and one["fitting_capacity"] == 0.1


@pytest.mark.parametrize("kind", ["true", "soft"])
def test_label_agreement_is_of_the_old_solver_whatever_the_targets(small_mnist, classifier, kind, monkeypatch):
    """For exact replay's generator too, whose solver learns true labels."""
    images = small_tasks(small_mnist)[0].train.batch(slice(None))[0]
    answer = dgr.Solver.answer
    monkeypatch.setattr(dgr.Solver, "answer", lambda solver, x: (answer(solver, x) + 1) % 10)
    soft = lambda solver, x, _: torch.eye(10)[answer(solver, x)]  # noqa: E731
    monkeypatch.setattr(dgr.Solver, "answer_softly", soft)
    measures = measure(small_mnist, images, classifier, replay_targets=kind, temperature=1.0)
    assert measures["label_agreement"] == {"true": 0, "soft": 1}[kind]


@pytest.mark.parametrize("changes", [{}, {"chain": True}, {"replay_mode": "none", "sample_log": True}])
def test_measuring_does_not_change_what_is_learned(small_mnist, classifier, changes):
    """Each task is measured, whatever trains a generator; in a chain, too, where each scholar is new."""
    outcomes = []
    for measured_by in (None, classifier):
        torch.manual_seed(5)
        training, recorder = learn(small_mnist, parts={"classifier": measured_by}, measured_images=100, **changes)
        heard = [event for event in recorder.events if event[1] != "test"]
        outcomes.append((training.scholar, training.matrix, heard, torch.get_rng_state()))
    (plain, *rest), (measured, *same) = outcomes
    assert_same_state(plain, measured.state_dict())
    assert rest[:2] == same[:2] and torch.equal(rest[2], same[2])
    assert len(training.generator_measures) == 2 and None not in training.generator_measures
    reported = {name: value for _, name, value in recorder.named("scalar", "test", 2) if "precision-" not in name}
    assert reported == {name: value for name, value in training.generator_measures[1].items() if name != "class_share"}


def test_a_classifier_is_trained_once_for_the_same_training_images(small_mnist, tmp_path, capfd, monkeypatch):
    """From random numbers of its own; test images play no part. A damaged one is made again."""
    monkeypatch.setattr(models, "learn_classifier", lambda network, _: nn.init.normal_(network[0].weight))
    (task,) = small_tasks(small_mnist, 1)
    torch.manual_seed(1)
    first = models.load_classifier([task.train], tmp_path)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(1).get_state())
    assert_same_state(models.load_classifier([task.train] * 3, tmp_path), first.state_dict())
    (path,) = (tmp_path / "classifiers").iterdir()
    assert capfd.readouterr().err.count("training the classifier") == 1
    models.load_classifier([task.train for task in small_tasks(small_mnist, 2)], tmp_path)
    assert len(list((tmp_path / "classifiers").iterdir())) == 2
    path.write_bytes(path.read_bytes()[:2000])
    assert_same_state(models.load_classifier([task.train], tmp_path), first.state_dict())
    assert "is damaged: it is made again" in capfd.readouterr().err
    again = models.load_classifier([task.train], tmp_path)
    assert not capfd.readouterr().err and not any(module.training for module in again.modules())


def test_a_classifier_that_cannot_be_kept_is_in_memory(small_mnist, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(models, "learn_classifier", lambda *_: None)
    (tmp_path / "classifiers").write_text("not a directory")
    models.load_classifier([task.train for task in small_tasks(small_mnist, 1)], tmp_path)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "can't be written" in line]
    assert "each run trains this classifier for itself" in line
