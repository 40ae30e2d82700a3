#!/usr/bin/env bash
# avalanche-lib 0.6.0: with `RWalkPlugin` (Riemannian walk) every update runs in evaluation mode: the plugin puts the network
# into that mode for a gradient of its own and leaves it there. Dropout drops nothing, and batch normalisation never learns
# its statistics: mean 0 and variance 1 to the end. Even with a factor of 0, which adds nothing to the loss, it does not learn
# what `Naive` learns, so a comparison of methods is one of dropout and normalisation, too. `LFLPlugin` does the same from
# the second update of the second task on. Expected: updates in training mode, and with a factor of 0 the weights of
# `Naive`. For RWalk, a plugin behind it that calls `strategy.model.train()` in `before_forward` restores both.
#
# Usage: PYTHON=python3.12 findings/avalanche-rwalk-in-evaluation-mode.sh      (installs into a temporary folder)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check avalanche-lib==0.6.0 torch==2.14.1 torchvision==0.29.1 \
    torchmetrics==1.9.0 numpy==2.3.5 setuptools==80.9.0  # the latter for GPUtil, which imports distutils
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'END'
import avalanche
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.models.base_model import BaseModel
from avalanche.training.plugins import LFLPlugin, RWalkPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive

torch.set_num_threads(1)
torch.manual_seed(0)
tasks = []
for task in range(2):
    x = 3 + torch.randn(256, 16)
    tasks.append((x, (x[:, task] > 3).long()))
benchmark = tensors_benchmark(train_tensors=tasks, test_tensors=tasks, task_labels=[0, 0])


class Network(torch.nn.Module, BaseModel):
    def __init__(self):
        super().__init__()
        self.normalisation = torch.nn.BatchNorm1d(16)
        self.hidden, self.dropout, self.output = torch.nn.Linear(16, 32), torch.nn.Dropout(), torch.nn.Linear(32, 2)

    def get_features(self, x):
        return self.dropout(self.hidden(self.normalisation(x)).relu())

    def forward(self, x):
        return self.output(self.get_features(x))


class Modes(SupervisedPlugin):
    """Whether each update's forward pass was in training mode."""

    def __init__(self):
        super().__init__()
        self.training = []

    def after_forward(self, strategy, **kwargs):
        self.training.append(strategy.model.training)


class Train(SupervisedPlugin):
    def before_forward(self, strategy, **kwargs):
        strategy.model.train()


def learn(*plugins):
    """The weights and statistics after two tasks of 40 updates, the share of updates in training mode, and the mean."""
    torch.manual_seed(1)
    model, modes = Network(), Modes()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=32,
        train_epochs=5,
        plugins=[*plugins, modes],
        evaluator=None,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    state = torch.cat([value.flatten().float() for value in model.state_dict().values()])
    assert len(modes.training) == 80, "the set-up has changed"
    return state, sum(modes.training) / 80, model.normalisation.running_mean.mean().item()


print(f"avalanche-lib {avalanche.__version__}, two tasks, inputs with mean 3:")
plain = learn()
print(f"{'Naive':29} {plain[1]:4.0%} of updates in training mode, mean of batch normalisation {plain[2]:.2f}")
assert plain[1] == 1 and plain[2] > 2.9, "the set-up has changed"
for name, plugins, expected_share, expected_same in (
    ("RWalk, factor 0.1", [RWalkPlugin()], 0, False),
    ("RWalk, factor 0", [RWalkPlugin(ewc_lambda=0)], 0, False),
    ("RWalk, factor 0, then train()", [RWalkPlugin(ewc_lambda=0), Train()], 1, True),
    ("LFL, factor 0", [LFLPlugin(0)], 41 / 80, False),  # never as Naive: it freezes the output layer by design
):
    state, share, mean = learn(*plugins)
    same = torch.equal(state, plain[0])
    note = "" if name.startswith("LFL") else f", all as with Naive: {same}"
    print(f"{name:29} {share:4.0%} of updates in training mode, mean of batch normalisation {mean:.2f}{note}")
    assert (share, same) == (expected_share, expected_same), "the behaviour has changed"
    assert (mean == 0) == (share == 0), "the behaviour has changed"
END
