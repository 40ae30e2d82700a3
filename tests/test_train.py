"""The task loop: what is measured, what is told to observers, and what a run leaves in files."""

import csv
import json
import types

import pytest
import torch
from test_dgr import SMALL, assert_same_state, small_scholar, state

import data
import dgr
import main
import train
import visual
from utils import UserError


def schedule(**changes) -> train.Schedule:
    settings = {
        "replay_mode": "generative-replay",
        "replay_targets": dgr.Targets("hard"),
        "importance_of_new_task": 0.5,
        "chain": False,
        "train_generator": True,
        "generator_iterations": 5,
        "solver_iterations": 6,
        "batch_size": 4,
        "lr_schedule": "constant",
        "test_size": 20,
        "eval_log_interval": 3,
        "loss_log_interval": 2,
        "checkpoint_interval": 1e9,
        "images_at_once": 64,
    }
    return train.Schedule(**settings | changes)


def small_tasks(small_mnist, number: int = 2) -> list[data.Task]:
    library = data.Library(small_mnist, torch.device("cpu"), accept_unverified=True)
    return data.permutated_mnist(
        library, data.ExperimentOptions(mnist_permutation_number=number, mnist_permutation_seed=0)
    )


class Recorder(visual.Observer):
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


def learn(small_mnist, scholar=None, tasks=2, **changes):
    recorder, saved, scholar = Recorder(), [], scholar or small_scholar()
    noise = torch.zeros(2, 5)
    training = train.Training(
        lambda: scholar,
        small_tasks(small_mnist, tasks),
        schedule(**changes),
        observers=[recorder],
        sample=lambda scholar: scholar.generator.sample(2, noise),
        save_scholar=lambda scholar: saved.append(training.task),
    )
    return training.run(), recorder, saved


def test_precision_counts_right_answers_over_the_whole_split(small_mnist):
    test = small_tasks(small_mnist)[0].test

    class Nine(dgr.Solver):
        def answer(self, x):
            return torch.full((len(x),), 9)  # right in the last row too, after the last whole batch

    assert train.precision(Nine(torch.nn.Identity()), test, 7) == 0.1


def test_precision_is_measured_on_the_test_splits(small_mnist, monkeypatch):
    tasks, seen = small_tasks(small_mnist, 3), []
    monkeypatch.setattr(train, "precision", lambda _solver, split, _at_once: seen.append(split) or 0.5)
    train.Training(
        small_scholar,
        tasks,
        schedule(train_generator=False),
        observers=[],
        sample=lambda _: None,
        save_scholar=lambda scholar: None,
    ).run()
    whole = [split for split in seen if len(split) > 20]
    assert [id(split) for split in whole] == [id(tasks[i].test) for i in (0, 0, 1, 0, 1, 2)]
    assert torch.equal(seen[0].images, tasks[0].test.spread(20).images)


def test_measuring_leaves_buffers_and_random_streams_as_they_were(small_mnist):
    """Trap 5: test data leak into running statistics."""
    scholar, test = small_scholar(), small_tasks(small_mnist)[1].test
    before, stream = state(scholar), torch.get_rng_state()
    train.precision(scholar.solver, test, 64)
    assert all(torch.equal(value, before[name]) for name, value in scholar.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)


def test_looking_does_not_change_what_is_learned(small_mnist):
    """Measuring often or seldom: the same weights."""
    scholars = []
    for interval in (1, 1000):
        torch.manual_seed(5)
        scholars.append(small_scholar())
        learn(small_mnist, scholars[-1], eval_log_interval=interval, loss_log_interval=interval)
    first, second = (state(scholar) for scholar in scholars)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sample_grids_leave_the_random_stream_as_it_was():
    """Trap 5: and each grid is of the same noise."""
    generator, options = small_scholar().generator, types.SimpleNamespace(seed=3, sample_size=2)
    before = torch.get_rng_state()
    first = main.sample_grid(generator, options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(main.sample_grid(generator, options), first)


def test_sample_grids_of_a_generator_that_draws_more_than_z_repeat_too():
    class Diffusion(dgr.Generator):
        def sample(self, n, z=None):
            return super().sample(n, z) + torch.rand(n, 1, 1, 1)

    generator, options = Diffusion(small_scholar().generator.net, 5), types.SimpleNamespace(seed=3, sample_size=2)
    before = torch.get_rng_state()
    first = main.sample_grid(generator, options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(main.sample_grid(generator, options), first)


def test_matrix_has_a_row_for_each_task_over_the_tasks_so_far(small_mnist):
    matrix, recorder, saved = learn(small_mnist, tasks=3)
    assert [[value is not None for value in row] for row in matrix] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert saved == [1, 2, 3]
    for task, row in enumerate(matrix, start=1):
        told = [(6, f"precision-{old}", value) for old, value in enumerate(row, start=1) if value is not None]
        assert recorder.named("scalar", "test", task) == told


def test_no_curve_before_its_task_has_begun(small_mnist):
    _, recorder, _ = learn(small_mnist)
    precisions = [event for event in recorder.named("scalar", "solver") if event[2].startswith("precision")]
    assert [(task, iteration, name) for task, iteration, name, _ in precisions] == [
        (1, 3, "precision-1"),
        (1, 6, "precision-1"),
        (2, 3, "precision-1"),
        (2, 3, "precision-2"),
        (2, 6, "precision-1"),
        (2, 6, "precision-2"),
    ]


def test_losses_are_told_at_their_interval_and_at_the_end(small_mnist):
    _, recorder, _ = learn(small_mnist)
    assert [i for i, name, _ in recorder.named("scalar", "generator", 1) if name == "critic-loss"] == [2, 4, 5]
    assert [i for i, name, _ in recorder.named("scalar", "solver", 2) if name == "loss"] == [2, 4, 6]
    assert recorder.named("images") == [(1, 3, 2), (1, 5, 2), (2, 3, 2), (2, 5, 2)]


def test_generator_learns_only_where_it_is_asked_to(small_mnist):
    scholar = small_scholar()
    before = state(scholar.generator)
    _, recorder, _ = learn(small_mnist, scholar, replay_mode="none", train_generator=False, importance_of_new_task=1.0)
    assert recorder.named("begin") == [("solver", 1, 6), ("solver", 2, 6)]
    assert all(torch.equal(value, before[name]) for name, value in scholar.generator.state_dict().items())


@pytest.mark.parametrize("mode", dgr.REPLAY_MODES)
def test_replay_of_the_second_task_is_of_the_first_alone(small_mnist, monkeypatch, mode):
    seen = []
    plain = dgr.REPLAY_MODES[mode]
    monkeypatch.setitem(
        dgr.REPLAY_MODES, mode, lambda h, tasks, targets: seen.append(list(tasks)) or plain(h, tasks, targets)
    )
    learn(small_mnist, replay_mode=mode)
    assert len(seen) == 1 and len(seen[0]) == 1 and seen[0][0].permutation is None


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


def test_each_task_is_learned_from_its_training_split_and_the_last_scholar(small_mnist, monkeypatch):
    tasks, seen, ends = small_tasks(small_mnist, 3), watch_learning(monkeypatch), []
    train.Training(
        small_scholar,
        tasks,
        schedule(importance_of_new_task="auto", replay_targets=dgr.Targets("soft", 3.0)),
        observers=[],
        sample=lambda _: None,
        save_scholar=lambda scholar: ends.append(scholar.remember().state_dict()),
    ).run()
    assert [part for part, *_ in seen] == ["generator", "solver"] * 3
    for (part, _, current, replay, how), task in zip(seen, (1, 1, 2, 2, 3, 3), strict=True):
        assert current is tasks[task - 1].train and how["r"] == 1 / task and how["batch_size"] == 4
        assert part == "generator" or how["temperature"] == 3.0
        assert (replay is None) == (task == 1)
        if replay is not None:
            assert_same_state(replay.old_scholar, ends[task - 2])


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_learning_rate_of_every_update(small_mnist, monkeypatch, kind):
    """Linear: the first update of a phase has all of it, and one more after the last would have none."""
    scholar, seen = small_scholar(), {"generator": [], "solver": []}
    for part, rates in seen.items():
        network = getattr(scholar, part)
        optimisers = [value for value in vars(network).values() if isinstance(value, torch.optim.Optimizer)]
        assert len(optimisers) == (2 if part == "generator" else 1)

        def update(*args, plain=network.update, optimisers=optimisers, rates=rates):
            rates.append({group["lr"] for optimiser in optimisers for group in optimiser.param_groups})
            return plain(*args)

        monkeypatch.setattr(network, "update", update)
    learn(small_mnist, scholar, lr_schedule=kind)
    for part, n in (("generator", 5), ("solver", 6)):
        left = [1.0 if kind == "constant" else 1 - i / n for i in range(n)]
        assert seen[part] == [{SMALL.lr * share} for share in left] * 2  # anew for the second task


def test_exact_replay_is_of_the_training_splits_of_all_tasks_before(small_mnist, monkeypatch):
    seen, plain = [], dgr.ExactReplay
    monkeypatch.setitem(
        dgr.REPLAY_MODES, "exact-replay", lambda h, tasks, targets: seen.append(tasks) or plain(h, tasks, targets)
    )
    learn(small_mnist, replay_mode="exact-replay", tasks=3, train_generator=False)
    assert [[len(split) for split in old] for old in seen] == [[200], [200, 200]]  # test splits have 100 rows
    assert [old[-1].permutation is None for old in seen] == [True, False]


def test_scholars_of_a_chain_learn_from_scratch_and_from_the_last_one_alone(small_mnist, monkeypatch):
    scholars, seen = [], watch_learning(monkeypatch)

    def new_scholar():
        scholars.append(small_scholar())
        return scholars[-1]

    matrix = train.Training(
        new_scholar,
        small_tasks(small_mnist, 3),
        schedule(chain=True),
        observers=[],
        sample=lambda scholar: None,
        save_scholar=lambda scholar: None,
    ).run()
    parts = [part for scholar in scholars for part in (scholar.generator, scholar.solver)]
    assert [network for _, network, *_ in seen] == parts and len(scholars) == 3
    assert all(isinstance(current, data.Split) for _, _, current, *_ in seen[:2])
    for (_, _, current, replay, how), teacher in zip(seen[2:], [scholars[i] for i in (0, 0, 1, 1)], strict=True):
        assert isinstance(current, dgr.GenerativeReplay) and replay is None and how["r"] == 1
        taught = teacher.solver.remember().state_dict()
        for name, value in current.old_scholar.solver.state_dict().items():
            assert torch.equal(value, taught[name])
    assert [[value is not None for value in row] for row in matrix] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_outcome_of_a_chain():
    matrix = [[0.9, None, None], [None, 0.7, None], [None, None, 0.6]]
    assert train.average_precision(matrix) == 0.6 and train.forgetting(matrix) == pytest.approx(0.3)


@pytest.mark.parametrize("loss_log_interval", [1, 100])
def test_diverged_training_stops_with_where_and_what_to_try(small_mnist, loss_log_interval):
    scholar = small_scholar()
    with torch.no_grad():
        scholar.solver.net[0].weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"task 1, solver iteration \d.*--lr"):
        learn(small_mnist, scholar, loss_log_interval=loss_log_interval)


# -------------------------------------------------------------------------------------------- files of a run


def test_average_precision_and_forgetting():
    matrix = [[0.7, None, None], [0.9, 0.6, None], [0.8, 0.65, 1.0]]  # best in the middle; better at the end
    assert train.average_precision(matrix) == pytest.approx((0.8 + 0.65 + 1) / 3)
    assert train.forgetting(matrix) == pytest.approx(((0.9 - 0.8) + (0.6 - 0.65)) / 2)
    assert train.forgetting([[0.9]]) == 0


def test_metrics_are_on_disk_as_they_are_told(tmp_path):
    """Trap 11: live plots as the only output."""
    files = train.RunFiles(tmp_path / "run", {"a": 1})
    files.scalars("solver", 1, 30, {"loss": 0.1 + 0.2, "precision-1": 1.0})
    with (tmp_path / "run/metrics.csv").open() as file:  # not closed by the run yet
        rows = list(csv.reader(file))
    assert rows[0] == ["phase", "task", "iteration", "name", "value"]
    assert rows[1:] == [
        ["solver", "1", "30", "loss", "0.30000000000000004"],
        ["solver", "1", "30", "precision-1", "1.0"],
    ]


def test_summary(tmp_path):
    files = train.RunFiles(tmp_path / "run", {})
    files.write_summary([[0.5, None], [0.25, 1.0]], experiment="permutated-mnist", replay_mode="none", seed=3)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary.pop("seconds") >= 0
    assert summary == {
        "experiment": "permutated-mnist",
        "replay_mode": "none",
        "seed": 3,
        "precision": [[0.5, None], [0.25, 1.0]],
        "average_precision": 0.625,
        "forgetting": 0.25,
    }
