#!/usr/bin/env bash
# clarena 1.1.0: what elastic weight consolidation (`EWC`) learns depends on when it takes the Fisher information. With
# `when_calculate_fisher_information="train"` every update goes along the gradient of the loss twice: once for the Fisher
# information and once for the update, without setting it to zero in between. The penalty's gradient comes once, so it has
# half its weight. With "train_end", the importances are a sum over one pass through the data, divided by the images of all
# epochs: after ten epochs they are a tenth. Expected: the updates of `Finetuning` in the first task, where there is no
# penalty, and the same importances for the same weights and data. To undo both, halve the learning rate and double the
# factor ("train"), or multiply the factor by the number of epochs ("train_end").
#
# Usage: PYTHON=python3.12 findings/clarena-ewc-gradient-twice.sh      (installs into a temporary folder)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check clarena==1.1.0 torch==2.14.1 torchvision==0.29.1 \
    lightning==2.6.6 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import functools
import importlib.metadata
import logging
import warnings

import lightning
import torch
from clarena.backbones import CLMLP
from clarena.cl_algorithms import EWC, Finetuning
from clarena.heads import HeadsTIL

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)


class Points(lightning.LightningDataModule):
    """64 points of two classes, in the same batches of 16 in every epoch."""

    def train_dataloader(self):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
        points = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        return torch.utils.data.DataLoader(points, batch_size=16)


def learn(algorithm, rate, epochs, **options):
    """The algorithm after a first task, and how far it has moved the weights of its backbone."""
    torch.manual_seed(0)
    model = algorithm(CLMLP(16, [32], 8), HeadsTIL(8), **options)
    model.setup_task_id(1, 2, functools.partial(torch.optim.SGD, lr=rate), None)
    weights = torch.nn.utils.parameters_to_vector(model.backbone.parameters()).detach().clone()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    steps = {"max_steps": 1} if epochs == 0 else {"max_epochs": epochs}
    lightning.Trainer(accelerator="cpu", **steps, **quiet).fit(model, datamodule=Points())
    return model, torch.nn.utils.parameters_to_vector(model.backbone.parameters()).detach() - weights


def ewc(when, rate, epochs):
    return learn(EWC, rate, epochs, parameter_change_reg_factor=1.0, when_calculate_fisher_information=when)


print(f"clarena {importlib.metadata.version('clarena')}, a first task:")
_, plain = learn(Finetuning, 0.1, 0)
assert plain.norm() > 0, "nothing was learned"
for when, times in (("train", 2), ("train_end", 1)):
    _, moved = ewc(when, 0.1, 0)
    print(f"Fisher information at {when:9}: the first update is {(moved.norm() / plain.norm()).item():.3f} times Finetuning's")
    assert torch.allclose(moved, times * plain, rtol=1e-4, atol=1e-7), "the behaviour has changed"
for when, times in (("train", 1), ("train_end", 10)):
    one, ten = (ewc(when, 0.0, epochs)[0].parameter_importance[1] for epochs in (1, 10))
    ratio = sum(v.sum() for v in one.values()) / sum(v.sum() for v in ten.values())
    print(f"Fisher information at {when:9}, weights kept: after one epoch {ratio.item():.3f} times that after ten")
    assert abs(ratio.item() - times) < 0.01, "the behaviour has changed"
END
