"""Things that are compared run in turns, in one process, with an A/A pair: the first one runs twice a round.

A machine changes its speed from second to second, and others work on it. So a ratio is the median of the ratios of
rounds, in which all have run next to each other, and the A/A pair says how far the same thing comes apart from itself
in these very rounds. Wall time is what a user waits; CPU time, of all threads, tells more on a busy machine.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Call = Callable[[], Any]  # returns when its work is done
_LEAST = 0.02  # seconds of one timing: a shorter call is repeated
_PAUSE = 0.01  # seconds between calls, in which threads that wait for work by spinning go to sleep
_AGAIN = " (again)"
_SIGMA = 1.4826 * 1.2533  # standard error of a median over MAD / sqrt(n), for normal errors


class Clock(NamedTuple):
    """Two clocks in seconds, and how to wait; made-up ones in tests."""

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    sleep: Callable[[float], None] = time.sleep


class Ratio(NamedTuple):
    """How many times as fast as another, and how far that may be off by the noise of its rounds."""

    value: float
    noise: float  # of the logarithm


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call: [rounds] each, wall and CPU. `pair` is the second run of the A/A pair."""

    wall: dict[str, np.ndarray]
    cpu: dict[str, np.ndarray]
    first: str

    def seconds(self, name: str, clock: str = "wall") -> float:
        """The median."""
        return float(np.median(getattr(self, clock)[name]))

    def noise(self, clock: str = "wall") -> float:
        """Of the A/A pair: the logarithm of its ratio, with two standard errors on top."""
        times = getattr(self, clock)
        return noise(np.log(times[self.first + _AGAIN] / times[self.first]))

    def ratio(self, name: str, to: str, clock: str = "wall") -> Ratio:
        """How many times as fast `name` is as `to`."""
        times = getattr(self, clock)
        logs = np.log(times[to] / times[name])
        return Ratio(float(np.exp(np.median(logs))), max(self.noise(clock), _error(logs)))

    def row(self, name: str, to: str | None = None) -> dict[str, float]:
        """What a result keeps of one call: milliseconds, and how many times as fast as `to` it is."""
        found = {"ms": 1e3 * self.seconds(name), "cpu_ms": 1e3 * self.seconds(name, "cpu"), "noise": self.noise()}
        found["cpu_noise"] = self.noise("cpu")
        if to is not None and to in self.wall:
            found |= {"speed": self.ratio(name, to).value, "cpu_speed": self.ratio(name, to, "cpu").value}
        return found


def _error(logs: np.ndarray) -> float:
    """Two standard errors of the median."""
    return float(2 * _SIGMA * np.median(np.abs(logs - np.median(logs))) / np.sqrt(len(logs)))


def noise(logs: np.ndarray) -> float:
    """How far a ratio that should be 1 is off: its median's logarithm, and two standard errors of it."""
    return float(abs(np.median(logs))) + _error(logs)


def alternate(
    calls: Mapping[str, Call], rounds: int, *, warm: bool = True, pause: float = _PAUSE, clock: Clock | None = None
) -> Times:
    """Time all calls in turns, `rounds` times. The first one runs twice a round; the order turns round every time.

    `warm`: each call runs before anything counts, so that it is compiled, and is repeated within a timing when it
    takes less than 20 ms.
    """
    clock = clock or Clock()
    first = next(iter(calls))
    several = {**calls, first + _AGAIN: calls[first]}
    counts = {name: _repeats(call, clock) if warm else 1 for name, call in calls.items()}
    counts[first + _AGAIN] = counts[first]
    wall: dict[str, list[float]] = {name: [] for name in several}
    cpu: dict[str, list[float]] = {name: [] for name in several}
    for number in range(rounds):
        for name in list(several)[:: 1 if number % 2 else -1]:
            clock.sleep(pause)
            begin, used = clock.wall(), clock.cpu()
            for _ in range(counts[name]):
                several[name]()
            cpu[name].append((clock.cpu() - used) / counts[name])
            wall[name].append((clock.wall() - begin) / counts[name])
    least = 1e-9  # a clock that did not move
    return Times(
        {name: np.maximum(value, least) for name, value in wall.items()},
        {name: np.maximum(value, least) for name, value in cpu.items()},
        first,
    )


def _repeats(call: Call, clock: Clock) -> int:
    """So many take long enough to be timed; after one that compiles."""
    call()
    begin = clock.wall()
    call()
    return max(1, int(np.ceil(_LEAST / max(clock.wall() - begin, 1e-6))))


class Fit(NamedTuple):
    """cost = factor * size ** exponent, by least squares of the logarithms; `last` between the two largest sizes."""

    exponent: float
    last: float


def fit_exponent(sizes: list[float], costs: list[float]) -> Fit:
    """How a cost grows with a size. A cost that has a constant part grows faster at the end, which `last` shows."""
    x, y = np.log(sizes), np.log(np.maximum(costs, 1e-12))
    slope = float(np.polyfit(x, y, 1)[0])
    return Fit(slope, float((y[-1] - y[-2]) / (x[-1] - x[-2])))
