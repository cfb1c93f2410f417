"""Train a classifier of handwritten digits with a parameter server, and compare with one process.

    python examples/parameter_server.py                       # two workers, synchronous
    python examples/parameter_server.py --asynchronous --workers 4

The input is real: the 1,797 scanned digits that come with scikit-learn (`pip install
'poolray[examples]'`). The model is multinomial logistic regression, trained by gradient descent.

One actor, the *server*, owns the weights. Each *worker* is an actor too: it keeps its share of the
images for its life, takes the weights as an object ref, and gives back a gradient. Synchronous
steps wait for every worker, so they compute what one process would compute on all images: the
example checks that. Asynchronous ones apply each gradient as it comes; nobody waits for the
slowest.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import poolray

CLASSES = 10
TEST_SHARE = 0.25
Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Data:
    """Images as rows of numbers, with a 1 in front for the bias, and the digits they show."""

    train_images: Floats
    train_labels: Labels
    test_images: Floats
    test_labels: Labels


def load_data(seed: int) -> Data:
    """The digits of scikit-learn, shuffled and split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.hstack([np.ones((len(digits.data), 1)), digits.data / 16.0])
    order = np.random.default_rng(seed).permutation(len(images))
    test = int(len(images) * TEST_SHARE)
    return Data(
        images[order[test:]],
        digits.target[order[test:]],
        images[order[:test]],
        digits.target[order[:test]],
    )


def gradient_sum(weights: Floats, images: Floats, labels: Labels) -> Floats:
    """The gradient of the cross-entropy, summed over some images."""
    scores = images @ weights
    scores -= scores.max(axis=1, keepdims=True)
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    probabilities[np.arange(len(labels)), labels] -= 1.0
    gradient: Floats = images.T @ probabilities
    return gradient


def accuracy(weights: Floats, images: Floats, labels: Labels) -> float:
    """The share of images that are recognized."""
    return float(np.mean((images @ weights).argmax(axis=1) == labels))


@poolray.remote
class Server:
    """Owns the weights."""

    def __init__(self, features: int, rate: float, images: int) -> None:
        self.weights = np.zeros((features, CLASSES))
        self.rate = rate
        self.images = images

    def step(self, *gradients: Floats) -> Floats:
        """Take gradients in; gives the new weights."""
        for gradient in gradients:
            self.weights -= self.rate / self.images * gradient
        return self.weights

    def get_weights(self) -> Floats:
        return self.weights


@poolray.remote
class Worker:
    """Owns a share of the images."""

    def __init__(self, images: Floats, labels: Labels) -> None:
        self.images = images
        self.labels = labels

    def gradient(self, weights: Floats) -> Floats:
        return gradient_sum(weights, self.images, self.labels)


def train_here(data: Data, rate: float, steps: int) -> Floats:
    """The same in one process: what the actors are compared with."""
    weights = np.zeros((data.train_images.shape[1], CLASSES))
    for _ in range(steps):
        gradient = gradient_sum(weights, data.train_images, data.train_labels)
        weights -= rate / len(data.train_images) * gradient
    return weights


def start(data: Data, count: int, rate: float) -> tuple[Any, list[Any]]:
    """The server, and workers with their shares of the images."""
    server = Server.remote(data.train_images.shape[1], rate, len(data.train_images))
    shares = zip(
        np.array_split(data.train_images, count),
        np.array_split(data.train_labels, count),
        strict=True,
    )
    return server, [Worker.remote(images, labels) for images, labels in shares]


def train_synchronously(server: Any, workers: list[Any], steps: int) -> None:
    """Every step waits for all gradients. The driver passes refs on and touches no numbers."""
    weights = server.get_weights.remote()
    for _ in range(steps):
        weights = server.step.remote(*(worker.gradient.remote(weights) for worker in workers))
    poolray.get(weights)


def train_asynchronously(server: Any, workers: list[Any], steps: int) -> None:
    """Each gradient counts as it comes, computed from weights that others change meanwhile."""
    weights = server.get_weights.remote()
    under_way = {worker.gradient.remote(weights): worker for worker in workers}
    for _ in range(steps * len(workers)):
        ready, _ = poolray.wait(list(under_way), num_returns=1)
        worker = under_way.pop(ready[0])
        under_way[worker.gradient.remote(server.step.remote(ready[0]))] = worker
    poolray.get(list(under_way))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train with a parameter server.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1.0, help="size of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asynchronous", action="store_true", help="nobody waits for the slowest")
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.steps < 1:
        parser.error("--workers and --steps must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        data = load_data(options.seed)
    except ImportError:
        print("This example needs scikit-learn: pip install 'poolray[examples]'", file=sys.stderr)
        return 2
    poolray.init()
    started = time.perf_counter()
    server, workers = start(data, options.workers, options.rate)
    train = train_asynchronously if options.asynchronous else train_synchronously
    train(server, workers, options.steps)
    weights = poolray.get(server.get_weights.remote())
    seconds = time.perf_counter() - started
    poolray.shutdown()

    alone = train_here(data, options.rate, options.steps)
    ours = accuracy(weights, data.test_images, data.test_labels)
    theirs = accuracy(alone, data.test_images, data.test_labels)
    print(f"{len(data.train_labels):,} images to train on, {len(data.test_labels):,} to test")
    print(f"{options.workers} workers, {options.steps} steps in {seconds:.2f} s")
    print(f"recognized: {ours:.1%} with the server, {theirs:.1%} in one process")
    same = options.asynchronous or np.allclose(weights, alone)
    if not same or ours < theirs - 0.05:
        print("The weights are NOT those of one process.", file=sys.stderr)
        return 1
    if not options.asynchronous:
        print("The weights are those of one process.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
