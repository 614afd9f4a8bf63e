"""How many samples does a classifier of the real pictures recognise, and how black are their corners?

    python tests/recognise.py --data FASHION --checkpoint runs/demo --steps 1 2 8 32

A small CNN is trained on the 60,000 training pictures of Fashion-MNIST in FASHION (idx files) and kept beside the script's
--cache; then pictures are drawn, 1,000 by default, classes in turn, guided as the checkpoint says. Printed per number of
steps: share recognised as the class asked for, Frechet distance of the CNN's features to the test set's, and the mean of
the four 2 x 2 corners (of 255). The row "real" is the test set. Run by hand; no test runs it.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import sample


def read(folder: Path, name: str, head: int) -> torch.Tensor:
    raw = np.frombuffer(gzip.open(next(folder.rglob(f"{name}*.gz"))).read(), np.uint8, offset=head)
    return torch.from_numpy(raw.copy())


def pictures(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 1, 28, 28) uint8 and (n,) int64 of "train" or "t10k"."""
    return read(folder, f"{part}-images", 16).view(-1, 1, 28, 28), read(folder, f"{part}-labels", 8).long()


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(128, 10)

    def forward(self, x):  # (B, 1, 28, 28) uint8 -> (B, 128)
        return self.features(x.float() / 127.5 - 1)


def train_classifier(x, y, epochs=3, batch=128) -> Classifier:
    torch.manual_seed(0)
    model, steps = Classifier(), epochs * len(x) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        if step % (len(x) // batch) == 0:
            order = torch.randperm(len(x))
        index = order[(step % (len(x) // batch)) * batch :][:batch]
        loss = F.cross_entropy(model.head(model(x[index])), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def judge(model, x, y, reference=None) -> tuple[float, float, float, tuple]:
    """Share recognised, Frechet distance to the reference's statistics, mean of the corners, own statistics."""
    features = torch.cat([model(part) for part in x.split(500)])
    right = (model.head(features).argmax(1) == y).double().mean().item()
    double = features.double()
    own = double.mean(0), double.T.cov()
    distance = 0.0
    if reference is not None:
        (mean, cov), (other, other_cov) = own, reference
        roots = torch.linalg.eigvals(cov @ other_cov).real.clamp(min=0).sqrt().sum()
        distance = float((mean - other).square().sum() + cov.trace() + other_cov.trace() - 2 * roots)
    corners = x[..., [0, 1, -2, -1], :][..., [0, 1, -2, -1]].double().mean().item()
    return right, distance, corners, own


def draw(checkpoint, n: int, steps: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n pictures (n, 1, 28, 28) uint8, classes 0 to 9 in turn, guided as the checkpoint says."""
    sampler, y = sample.open_sampler(checkpoint, data.open_device()), torch.arange(n) % 10
    parts = torch.arange(n).split(250)
    x = [sampler.draw(part.tolist(), y[part].tolist(), steps, seed) for part in parts]
    return torch.from_numpy(np.concatenate(x)).permute(0, 3, 1, 2), y


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's four .gz files, at any depth")
    parser.add_argument("--checkpoint", required=True, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("-n", "--num", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("runs/recognise.pt"), help="where the classifier is kept")
    a = parser.parse_args(argv)
    if a.cache.is_file():
        model = Classifier()
        model.load_state_dict(torch.load(a.cache, weights_only=True))
        model.eval()
    else:
        model = train_classifier(*pictures(a.data, "train"))
        a.cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), a.cache)
    x, y = pictures(a.data, "t10k")
    right, _, corners, reference = judge(model, x, y)
    print(f"{'':24} steps  recognised  Frechet  corners\n{'real, 10,000':24} {'':5}  {right:10.3f}  {0:7.1f}  {corners:7.2f}")
    for checkpoint in a.checkpoint:
        for steps in a.steps:
            right, distance, corners, _ = judge(model, *draw(checkpoint, a.num, steps, a.seed), reference)
            print(f"{checkpoint[-24:]:24} {steps:5}  {right:10.3f}  {distance:7.1f}  {corners:7.2f}", flush=True)


if __name__ == "__main__":
    data.command(main)
