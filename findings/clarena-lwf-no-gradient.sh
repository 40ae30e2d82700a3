#!/usr/bin/env bash
# clarena 1.1.0: in `LwF` (learning without forgetting), the distillation loss is logged and added to the loss, but it has
# no gradient: the scores of the model in training are computed under `torch.no_grad()`, so that the old heads stay as they
# are. `LwF` therefore ends at the weights of `Finetuning`, bit for bit, whatever its factor. Expected: distillation keeps
# the shared layers near their old answers. Compute these scores outside `no_grad`, and keep the old heads as they are with
# `requires_grad_(False)`.
#
# Usage: PYTHON=python3.12 findings/clarena-lwf-no-gradient.sh      (installs into a temporary folder)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check clarena==1.1.0 torch==2.14.1 torchvision==0.29.1 \
    lightning==2.6.6 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import importlib.metadata

import torch
from clarena.backbones import CLMLP
from clarena.cl_algorithms import Finetuning, LwF
from clarena.heads import HeadsTIL

torch.set_num_threads(1)


def learn(algorithm, **options):
    """The weights after two tasks of two classes each, and the last distillation loss."""
    torch.manual_seed(0)
    model = algorithm(CLMLP(16, [32], 8), HeadsTIL(8), **options)
    for task in (1, 2):
        model.setup_task_id(task, 2, torch.optim.SGD, None)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(task)
        for _ in range(50):
            x = torch.randn(32, 16, generator=generator)
            out = model.training_step((x, (x[:, task] > 0).long()))
            optimiser.zero_grad()
            out["loss"].backward()
            optimiser.step()
        model.on_train_end()
    distillation = out.get("loss_reg", torch.zeros(()))
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach(), distillation


print(f"clarena {importlib.metadata.version('clarena')}, two tasks:")
plain, _ = learn(Finetuning)
for factor in (1, 1000):
    weights, distillation = learn(LwF, distillation_reg_factor=factor, distillation_reg_temperature=2)
    print(
        f"LwF, factor {factor:4}: distillation loss {distillation.item():7.2f}, has a gradient: {distillation.requires_grad},"
        f" weights equal those of Finetuning: {torch.equal(weights, plain)}"
    )
    assert distillation.item() > 0.1 * factor, "the behaviour has changed: no distillation loss"
    assert not distillation.requires_grad and torch.equal(weights, plain), "the behaviour has changed"
END
