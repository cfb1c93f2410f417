"""Search for a good neural network on real data, and stop hopeless candidates early.

    python examples/hyperparameter_search.py --trials 40 --epochs 27

The data are the 1,797 handwritten digits that scikit-learn brings along. Each trial is a task that
trains a network with settings of its own, on half a CPU, so that two of them share one. After each
epoch it reports its score on validation data to an actor. The driver waits for reports and for
ends at once, and cancels a trial that, after 1, 3, 9, … epochs, is not among the best third of
those that have come as far: most of the work goes into the few that deserve it. (This is
asynchronous successive halving: no trial waits for another.)

At the end the best network is tried on test data that no trial has seen.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import poolray
from poolray.exceptions import TaskCancelledError

#: Of the trials that have come to a rung, one in so many goes on.
REDUCTION = 3
#: Of a CPU, for each trial.
SHARE = 0.5


@dataclass(frozen=True)
class Settings:
    """What a trial tries."""

    units: int
    learning_rate: float
    regularization: float
    batch_size: int

    @classmethod
    def draw(cls, generator: random.Random) -> Settings:
        return cls(
            units=generator.choice([8, 16, 32, 64, 128]),
            learning_rate=10 ** generator.uniform(-4.5, -0.5),
            regularization=10 ** generator.uniform(-6, 0),
            batch_size=generator.choice([16, 32, 64, 128]),
        )

    def __str__(self) -> str:
        return (
            f"{self.units:>4} units, rate {self.learning_rate:.5f}, "
            f"regularization {self.regularization:.6f}, batches of {self.batch_size}"
        )


@dataclass(frozen=True)
class Digits:
    """Pixels between 0 and 1 and what they show, for three purposes."""

    train: tuple[NDArray[np.float32], NDArray[np.int64]]
    validation: tuple[NDArray[np.float32], NDArray[np.int64]]
    test: tuple[NDArray[np.float32], NDArray[np.int64]]

    @classmethod
    def load(cls) -> Digits:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        order = np.random.default_rng(0).permutation(len(bunch.data))
        pixels, labels = (bunch.data[order] / 16).astype(np.float32), bunch.target[order]
        parts = [slice(0, 1000), slice(1000, 1400), slice(1400, None)]
        return cls(*((pixels[part], labels[part]) for part in parts))


@poolray.remote(num_cpus=0)
class Board:
    """Where trials report, and the driver reads."""

    def __init__(self) -> None:
        self._reports: list[tuple[int, int, float]] = []
        self._something_new = asyncio.Event()

    async def report(self, trial: int, epoch: int, score: float) -> None:
        self._reports.append((trial, epoch, score))
        self._something_new.set()

    async def news(self) -> list[tuple[int, int, float]]:
        """What was reported since the last call; waits for something."""
        await self._something_new.wait()
        self._something_new.clear()
        reports, self._reports = self._reports, []
        return reports


@poolray.remote(num_cpus=SHARE)
def train(trial: int, settings: Settings, digits: Digits, epochs: int, board: Any) -> Any:
    """A trained network; after each epoch the board is told how good it is."""
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    context = poolray.get_runtime_context()
    threadpool_limits(1)  # trials run side by side: each is to use one thread for its arithmetic
    network = MLPClassifier(
        (settings.units,),
        learning_rate_init=settings.learning_rate,
        alpha=settings.regularization,
        batch_size=settings.batch_size,
        random_state=trial,
    )
    for epoch in range(1, epochs + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a rate that is too high ends in overflows: so be it
            network.partial_fit(*digits.train, classes=range(10))
        # scikit-learn takes the interrupt of a cancellation for the user's wish to end the epoch.
        if context.is_canceled():
            raise KeyboardInterrupt
        board.report.remote(trial, epoch, float(network.score(*digits.validation)))
    return network


@dataclass
class Trial:
    """What the driver knows of a trial."""

    settings: Settings
    ref: Any
    epochs: int = 0
    score: float = 0.0
    is_stopped: bool = False
    network: Any = None


@dataclass
class Rungs:
    """Who may go on: epochs -> scores of the trials that have come as far."""

    epochs_max: int
    scores: dict[int, list[float]] = field(default_factory=dict)

    def may_go_on(self, epoch: int, score: float) -> bool:
        """Whether a score is among the best third of those at its rung."""
        rung = round(math.log(epoch, REDUCTION))
        if epoch >= self.epochs_max or REDUCTION**rung != epoch:
            return True
        others = self.scores.setdefault(epoch, [])
        others.append(score)
        better = sum(other > score for other in others)
        return better < max(1, len(others) / REDUCTION)


def search(digits: Digits, options: argparse.Namespace) -> list[Trial]:
    """Run all trials to their ends, early or not."""
    generator = random.Random(options.seed)
    board: Any = Board.remote()
    shared = poolray.put(digits)  # once, however many trials read it
    trials = []
    for number in range(options.trials):
        settings = Settings.draw(generator)
        ref = train.remote(number, settings, shared, options.epochs, board)
        trials.append(Trial(settings, ref))
    rungs = Rungs(options.epochs)
    running = {trial.ref: trial for trial in trials}
    news = board.news.remote()
    while running:
        ready, _ = poolray.wait([news, *running], num_returns=1)
        if ready == [news]:
            for number, epoch, score in poolray.get(news):
                trial = trials[number]
                trial.epochs, trial.score = epoch, score
                if options.stop_early and not rungs.may_go_on(epoch, score):
                    trial.is_stopped = True
                    poolray.cancel(trial.ref)
            news = board.news.remote()
        for ref in ready:
            if ref in running:
                finish(running.pop(ref))
    return trials


def finish(trial: Trial) -> None:
    """Take the result of a trial, if it has one."""
    try:
        trial.network = poolray.get(trial.ref)
        trial.is_stopped = False  # it was faster than its cancellation
    except TaskCancelledError:
        pass


def show(trials: list[Trial], digits: Digits, options: argparse.Namespace, seconds: float) -> int:
    finished = [trial for trial in trials if trial.network is not None]
    if not finished:
        print("no trial came to its end", file=sys.stderr)
        return 1
    scores = {id(t): float(t.network.score(*digits.validation)) for t in finished}
    best = max(finished, key=lambda trial: scores[id(trial)])
    for trial in sorted(trials, key=lambda trial: -trial.score)[:10]:
        end = "stopped" if trial.network is None else "best" if trial is best else "finished"
        print(f"{trial.score:7.1%} after {trial.epochs:>3} epochs  {end:<8}  {trial.settings}")
    run = sum(options.epochs if t.network is not None else t.epochs for t in trials)
    total = options.epochs * len(trials)
    stopped = len(trials) - len(finished)
    print(f"{len(trials)} trials in {seconds:.1f} s, {stopped} of them stopped early")
    print(f"{run:,} of {total:,} epochs were run ({run / total:.0%})")
    print(f"the best network reads {best.network.score(*digits.test):.1%} of the test digits")
    return 0


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Search for a network that reads digits.")
    parser.add_argument("--trials", type=positive, default=40)
    parser.add_argument("--epochs", type=positive, default=27, help="of a trial, at the most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=positive, default=max(2, os.cpu_count() or 2))
    parser.add_argument("--all", dest="stop_early", action="store_false", help="stop no trial")
    options = parser.parse_args(arguments)
    try:
        # Before the first worker is forked: they have it without importing it.
        import sklearn.neural_network  # noqa: F401 (imported for its effect)
    except ImportError:
        print("This example needs scikit-learn: pip install scikit-learn", file=sys.stderr)
        return 2
    digits = Digits.load()
    with poolray.init(num_cpus=options.workers):
        started = time.perf_counter()
        trials = search(digits, options)
        return show(trials, digits, options, time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
