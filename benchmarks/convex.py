"""The convex program by this package and by its peers: each section measures one thing and yields its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import lenet
from benchmarks.clock import Clock
from benchmarks.peers import TimedOut, Unavailable, authors, cvxpy_clarabel, cvxpy_scs, ours
from benchmarks.race import TOLERANCE, Judged, Reference, bisect, first, passed, reference
from benchmarks.report import Row
from benchmarks.steps import step_cost
from lightning_nettrim import ADMM, LayerProblem, Solution, Status, path

RHOS = (10, 30, 100, 300)
COUNTS = (100, 200, 400, 800, 1600, 3200)


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Args:
        data: folder of MNIST; ``$NETTRIM_DATA`` or ``./data`` if not given.
        out: folder of the results and of the trained weights.
        authors: folder of a clone of github.com/DNNToolBox/Net-Trim.
        samples: P.
        gain: radius relative to the response.
        layers: raced on, 1 to 3; the first is the one of ``cone`` and ``path``.
        minutes: allowed to a run of a cone solver, and to the authors' solver at one ρ.
        least: samples times neurons from which ``cone`` starts.
        small: shrink every size of ``step`` and ``growth`` by eight.
    """

    data: str | None = None
    out: Path = Path("runs") / "benchmarks"
    authors: Path | None = None
    samples: int = 10_000
    gain: float = 0.1
    layers: tuple[int, ...] = (2,)
    minutes: float = 10.0
    least: int = 1
    small: bool = False

    def problem(self, layer: int, gain: float, samples: int | None = None, neurons: int | None = None) -> LayerProblem:
        """See `lenet.problem`."""
        return lenet.problem(layer, gain, samples or self.samples, self.data, self.out, neurons)


def lenet_layers(settings: Settings) -> Iterator[Row]:
    """Every layer at three radii: how far the certificate gets at the default settings."""
    for layer in (1, 2, 3):
        for gain in (0.02, 0.1, 0.3):
            problem = settings.problem(layer, gain)
            yield _certified("lenet", _name(problem, layer, gain), "ours", *ours.timed(problem, ADMM()))


def peers(settings: Settings) -> Iterator[Row]:
    """Time to an objective and a violation within 1e-3, ours and the authors'; the ratio is to ours on the CPU.

    The cone solvers cannot hold these instances: see `cone`.
    """
    for layer in settings.layers:
        problem = settings.problem(layer, settings.gain)
        instance = _name(problem, layer, settings.gain)
        known = reference(problem)
        yield _referred("peers", instance, known)
        solution, seconds = ours.timed(problem, ADMM())
        yield _certified("peers", instance, "ours, certified", solution, seconds)
        mine = None
        for device, tf32 in (("cpu", False), ("cpu", True), ("cuda", False), ("cuda", True)):
            solver = f"ours, {device}{' TF32' * tf32}"
            try:
                run = first(known.judge(problem, ours.solve(problem, device, tf32, tolerance=TOLERANCE / 10)))
            except Unavailable as reason:
                yield Row("peers", instance, solver, note=f"skipped: {reason}")
                continue
            yield from _trace(instance, solver, run)
            end = _finish("peers", instance, solver, run, mine)
            mine = end.seconds if mine is None else mine
            yield end
        yield from _authors(settings, problem, instance, known, mine)


def _authors(
    settings: Settings, problem: LayerProblem, instance: str, known: Reference, mine: float | None
) -> Iterator[Row]:
    """The authors' solver at each ρ, on as many threads as are quickest, then the best of them."""
    finished = []
    try:
        threads = min(
            (1, None), key=lambda t: next(authors.solve(problem, settings.authors, RHOS[0], (20,), t)).seconds
        )
    except Unavailable as reason:
        yield Row("peers", instance, "authors", note=f"skipped: {reason}")
        return
    for rho in RHOS:
        solver = f"authors, ρ={rho}"

        def judged(counts: tuple[int, ...], rho: int = rho) -> Iterator[Judged]:
            return known.judge(problem, authors.solve(problem, settings.authors, rho, counts, threads))

        run = first(judged(COUNTS), 60 * settings.minutes)
        run = bisect(run, lambda count, judged=judged: next(judged((count,))))
        yield from _trace(instance, solver, run)
        end = _finish("peers", instance, solver, run, mine)
        yield end
        if any(map(passed, run)):
            finished.append(end)
    if finished:
        yield replace(min(finished, key=lambda row: row.seconds), solver="authors, best ρ")


def cone(settings: Settings) -> Iterator[Row]:
    """General cone solvers on ever more samples and neurons, each until it fails; the ratio is to ours."""
    layer, gain, racing = settings.layers[0], settings.gain, [cvxpy_clarabel, cvxpy_scs]
    for samples, neurons in _ladder(*settings.problem(layer, gain).Y.shape):
        if samples * neurons < settings.least:
            continue
        problem = settings.problem(layer, gain, samples, neurons)
        instance = _name(problem, layer, gain)
        known = reference(problem)
        yield _referred("cone", instance, known)
        run = first(known.judge(problem, ours.solve(problem, tolerance=TOLERANCE / 10)))
        mine = _finish("cone", instance, "ours, cpu", run)
        yield mine
        for peer in list(racing):
            try:
                run = first(known.judge(problem, peer.solve(problem, settings.minutes)))
            except (Unavailable, TimedOut) as reason:
                yield Row("cone", instance, peer.NAME, note=f"stopped: {reason}")
                racing.remove(peer)
                continue
            yield _finish("cone", instance, peer.NAME, run, mine.seconds)
            if not passed(run[-1]):
                racing.remove(peer)
        if not racing:
            break


def _ladder(most_samples: int, most_neurons: int) -> Iterator[tuple[int, int]]:
    """Samples and neurons, their product doubled by turns, up to the whole."""
    samples, neurons = min(250, most_samples), min(10, most_neurons)
    yield samples, neurons
    while (samples, neurons) != (most_samples, most_neurons):
        if samples < most_samples and (samples <= 25 * neurons or neurons == most_neurons):
            samples = min(2 * samples, most_samples)
        else:
            neurons = min(2 * neurons, most_neurons)
        yield samples, neurons


def step(settings: Settings) -> Iterator[Row]:
    """One step of ADMM; the ratio is to the two products with X that it contains."""
    sizes = [(10_000, 785, 300, "cpu", False), (10_000, 301, 100, "cpu", False), (8192, 4096, 4096, "cuda", True)]
    for P, N, M, device, tf32 in sizes:
        yield _step("step", _shrunk(settings, P, N, M), device, tf32)


def growth(settings: Settings) -> Iterator[Row]:
    """One step on the CPU as samples, inputs and outputs double in turn."""
    for P, N, M in ((2048, 256, 128), (4096, 256, 128), (2048, 512, 128), (2048, 256, 256), (4096, 512, 256)):
        yield _step("growth", _shrunk(settings, P, N, M), "cpu", False)


def radii(settings: Settings) -> Iterator[Row]:
    """Ten radii by `path`, far apart and close; the ratio is to the mean of the ten solved one by one."""
    layer = settings.layers[0]
    problem = settings.problem(layer, settings.gain)
    size = torch.linalg.matrix_norm(problem.Y)
    ladders = {"0.05 to 0.2": [0.05 * 4 ** (i / 9) for i in range(10)], "close": [0.08 * 1.05**i for i in range(10)]}
    for name, gains in ladders.items():
        epsilons = [gain * size for gain in gains]
        cold = [ours.timed(replace(problem, epsilon=epsilon), ADMM()) for epsilon in epsilons]
        clock = Clock()
        warm = path(problem, epsilons, ADMM())
        seconds, alone = clock.read(), sum(s for _, s in cold) / len(cold)
        one, all_ten = sum(int(s.steps) for s, _ in cold) / len(cold), sum(int(s.steps) for s in warm)
        instance, solved = f"layer {layer}, ten radii, {name}", sum(int(s.status) == Status.CONVERGED for s in warm)
        yield Row("path", instance, "a cold solve", round(one), alone, note="mean of ten")
        note = f"times a cold solve; {all_ten / one:.2f} times its steps; {solved} of {len(warm)} converged"
        yield Row("path", instance, "path", all_ten, seconds, ratio=seconds / alone, note=note)


SECTIONS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "lenet": lenet_layers,
    "peers": peers,
    "cone": cone,
    "step": step,
    "path": radii,
    "growth": growth,
}


def _name(problem: LayerProblem, layer: int, gain: float) -> str:
    P, N, M = *problem.X.shape, problem.Y.shape[-1]
    return f"layer {layer} {P}x{N}x{M} ε={gain:g}"


def _certified(section: str, instance: str, solver: str, solution: Solution, seconds: float) -> Row:
    status, gap, violation = Status(int(solution.status)).name, float(solution.gap), float(solution.violation)
    return Row(section, instance, solver, int(solution.steps), seconds, gap, violation, note=f"{status}, gap to bound")


def _referred(section: str, instance: str, known: Reference) -> Row:
    note = f"optimum {known.optimum:.8g}, known to this gap"
    return Row(section, instance, "reference", seconds=known.seconds, gap=known.gap, note=note)


def _trace(instance: str, solver: str, run: list[Judged]) -> Iterator[Row]:
    for trial, score in run:
        yield Row("trace", instance, solver, trial.steps, trial.seconds, score.gap, score.violation)


def _finish(section: str, instance: str, solver: str, run: list[Judged], mine: float | None = None) -> Row:
    """Where the criterion is first met, or the last trial with a note that it is not."""
    trial, score = next(filter(passed, run), run[-1])
    note = "" if passed((trial, score)) else f"not within {TOLERANCE:g}"
    if mine:
        note = ", ".join(filter(None, ("times ours on the CPU", note)))
    ratio = trial.seconds / mine if mine else None
    return Row(section, instance, solver, trial.steps, trial.seconds, score.gap, score.violation, ratio, note)


def _step(section: str, size: tuple[int, int, int], device: str, tf32: bool) -> Row:
    instance, solver = "x".join(map(str, size)), f"a step, {device}{' TF32' * tf32}"
    try:
        cost = step_cost(*size, device, tf32)
    except Unavailable as reason:
        return Row(section, instance, solver, note=f"skipped: {reason}")
    note = f"times its two products; {cost.gflops:.3g} GFLOP/s"
    return Row(section, instance, solver, 1, cost.step, ratio=cost.ratio, note=note)


def _shrunk(settings: Settings, *size: int) -> tuple[int, ...]:
    return tuple(s // 8 for s in size) if settings.small else size
