#!/usr/bin/env bash
# avalanche-lib 0.6.0: on the CPU, synaptic intelligence (`SynapticIntelligencePlugin`) does nothing, whatever its factor: it
# ends at the weights of `Naive`, bit for bit. It keeps "the weights before this update" and "the weights at the start of
# this task" as `param.detach().cpu().flatten()`, which on the CPU shares memory with the weights, so both move with them:
# every path length is 0, hence every importance, and so is every distance from the anchor. On a GPU, `.cpu()` copies.
# Expected: importances above 0, as on a GPU. Until then, make `extract_weights` copy, as below.
#
# Usage: PYTHON=python3.12 findings/avalanche-si-without-effect-on-cpu.sh      (installs into a temporary folder)
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
from avalanche.training.plugins import SynapticIntelligencePlugin
from avalanche.training.supervised import Naive

torch.set_num_threads(1)
torch.manual_seed(0)
tasks = []
for task in range(2):
    x = torch.randn(256, 16)
    tasks.append((x, (x[:, task] > 0).long()))
benchmark = tensors_benchmark(train_tensors=tasks, test_tensors=tasks, task_labels=[0, 0])


def extract_copies(model, target, excluded_parameters):
    """What the plugin's `extract_weights` does, with copies."""
    extract_views(model, target, excluded_parameters)
    for stored in target.values():
        stored.data = stored.data.clone()


def learn(*plugins):
    """The weights after two tasks."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=32,
        train_epochs=5,
        plugins=list(plugins),
        evaluator=None,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


print(f"avalanche-lib {avalanche.__version__}, synaptic intelligence on the CPU after two tasks:")
plain = learn()
extract_views = SynapticIntelligencePlugin.extract_weights
for copied in (False, True):
    if copied:
        SynapticIntelligencePlugin.extract_weights = staticmethod(extract_copies)
    for factor in (1, 10000):
        plugin = SynapticIntelligencePlugin(si_lambda=factor)
        same = torch.equal(learn(plugin), plain)
        importance = max(stored.data.abs().max().item() for stored in plugin.ewc_data[1].values())
        kept = "copied by hand" if copied else "as they are   "
        print(f"stored weights {kept}, factor {factor:5}: largest importance {importance:.3f}, the weights of Naive: {same}")
        assert (importance == 0) == same == (not copied), "the behaviour has changed"
END
