#!/usr/bin/env bash
# torchmetrics 1.9.0: MiFID (`MemorizationInformedFrechetInceptionDistance`) looks for copies the wrong way round. By its
# definition (Kaggle's, in the competition that introduced it) each generated image counts with its distance to the nearest
# training image; in torchmetrics, each training image counts with its distance to the nearest generated one. So a
# generator that only copies, but not every training image, has no penalty, and one that is new nine times out of ten is
# taken for a copier. With as many images of each kind, too, it misses a generator that copies a tenth of the training set.
# Expected: the reverse.
# The Fréchet distance is symmetric: pass generated images with `real=True` and training images with `real=False`.
#
# Usage: PYTHON=python3.12 findings/torchmetrics-mifid-averages-over-real-images.sh      (installs into a temporary folder)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torchmetrics==1.9.0 torch==2.14.1 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'END'
import torch
import torchmetrics
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

torch.set_num_threads(1)
torch.manual_seed(0)


def mifid(real, generated):
    """MiFID, where the images are their own features."""
    metric = MemorizationInformedFrechetInceptionDistance(feature=torch.nn.Identity())
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute().item()


def frechet(real, generated):
    """The Fréchet distance, which is MiFID without a penalty."""
    covariances = torch.cov(real.T), torch.cov(generated.T)
    cross = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    shift = (real.mean(0) - generated.mean(0)).square().sum()
    return (shift + covariances[0].trace() + covariances[1].trace() - 2 * cross).item()


training = torch.randn(500, 16, dtype=torch.float64)
new = torch.randn(4500, 16, dtype=torch.float64)
print(f"torchmetrics {torchmetrics.__version__}, 500 training images:")
for name, generated, copies in (
    ("500 copies of 50 training images", training[:50].repeat(10, 1), True),
    ("50 copies of 50 training images", training[:50], True),
    ("500 new images", new[:500], False),
    ("4500 new images and 500 copies", torch.cat((new, training)), False),
):
    distance, given, swapped = frechet(training, generated), mifid(training, generated), mifid(generated, training)
    print(f"{name:33} Fréchet distance {distance:6.3f}, MiFID {given:8.2g}, with real and generated swapped {swapped:8.2g}")
    # by definition, a penalty if generated images are copies on average (nearer than 0.1), and none otherwise
    assert (swapped > 10 * distance) == copies, "the behaviour has changed"
    if name != "500 new images":
        assert (given > 10 * distance) != copies, "the behaviour has changed"
END
