"""The task loop: what is measured, what is told to observers, and what a run leaves in files."""

import csv
import json

import pytest
import torch
from test_dgr import small_scholar, state

import data
import dgr
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

    def begin(self, phase, task, iterations):
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
        save_scholar=lambda scholar, task: saved.append(task),
    )
    return training.run(), recorder, saved


def test_precision_counts_right_answers_over_the_whole_split(small_mnist):
    test = small_tasks(small_mnist)[0].test

    class Zero(dgr.Solver):
        def answer(self, x):
            return torch.zeros(len(x), dtype=torch.int64)

    assert train.precision(Zero(torch.nn.Identity()), test, 7) == 0.1


def test_measuring_leaves_buffers_and_random_streams_as_they_were(small_mnist):
    """Trap 5: test data leak into running statistics."""
    scholar, test = small_scholar(), small_tasks(small_mnist)[1].test
    before, stream = state(scholar), torch.get_rng_state()
    train.precision(scholar.solver, test, 64)
    assert all(torch.equal(value, before[name]) for name, value in scholar.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)


def test_looking_does_not_change_what_is_learned(small_mnist):
    """Measuring often or seldom, with or without sample grids: the same weights."""
    scholars = []
    for interval in (1, 1000):
        torch.manual_seed(5)
        scholars.append(small_scholar())
        learn(small_mnist, scholars[-1], eval_log_interval=interval, loss_log_interval=interval)
    first, second = (state(scholar) for scholar in scholars)
    assert all(torch.equal(first[name], second[name]) for name in first)


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


def test_scholars_of_a_chain_learn_from_scratch_and_from_the_last_one_alone(small_mnist, monkeypatch):
    scholars, sources = [], []

    def new_scholar():
        scholars.append(small_scholar())
        return scholars[-1]

    plain = dgr.learn_solver

    def watched(solver, current, replay, **how):
        sources.append((solver, current, replay, how["r"]))
        return plain(solver, current, replay, **how)

    monkeypatch.setattr(dgr, "learn_solver", watched)
    matrix = train.Training(
        new_scholar,
        small_tasks(small_mnist, 3),
        schedule(chain=True),
        observers=[],
        sample=lambda scholar: None,
        save_scholar=lambda scholar, task: None,
    ).run()
    assert [solver for solver, *_ in sources] == [scholar.solver for scholar in scholars] and len(scholars) == 3
    assert isinstance(sources[0][1], data.Split)
    for (_, current, replay, r), teacher in zip(sources[1:], scholars, strict=False):
        assert isinstance(current, dgr.GenerativeReplay) and replay is None and r == 1
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
    matrix = [[0.9, None, None], [0.7, 0.8, None], [0.8, 0.6, 1.0]]
    assert train.average_precision(matrix) == pytest.approx(0.8)
    assert train.forgetting(matrix) == pytest.approx(((0.9 - 0.8) + (0.8 - 0.6)) / 2)
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
