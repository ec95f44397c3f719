"""The convex program, solved by this package and by other solvers; each section of the benchmark yields rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import lenet
from benchmarks.clock import Clock
from benchmarks.peers import TimedOut, Unavailable, authors, cvxpy_clarabel, cvxpy_scs, ours
from benchmarks.report import Row
from benchmarks.steps import step_cost
from benchmarks.time_to_tolerance import (
    TOLERANCE,
    Reference,
    ScoredTrial,
    bisect_steps,
    is_within_tolerance,
    reference,
    run_until_tolerance,
)
from lightning_nettrim import ADMM, LayerProblem, Solution, Status, solve_path

AUTHORS_RHOS = (10, 30, 100, 300)
AUTHORS_STEPS = (100, 200, 400, 800, 1600, 3200)


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Args:
        data: folder of MNIST; ``None`` is ``$NETTRIM_DATA`` or ``./data``.
        out: folder of the results and of the trained weights.
        authors: folder of a clone of github.com/DNNToolBox/Net-Trim.
        samples: P.
        epsilon: radius relative to the norm of the response.
        layers: layers of the section ``peers``, 1 to 3; the sections ``cone`` and ``path`` use the first of them.
        minutes: time limit of one run of a cone solver, and of the authors' solver at one ρ.
        min_size: the section ``cone`` skips instances with fewer samples × neurons.
        small: divide the sizes of the sections ``step`` and ``scaling`` by eight.
    """

    data: str | None = None
    out: Path = Path("runs") / "benchmarks"
    authors: Path | None = None
    samples: int = 10_000
    epsilon: float = 0.1
    layers: tuple[int, ...] = (2,)
    minutes: float = 10.0
    min_size: int = 1
    small: bool = False

    def problem(
        self, layer: int, epsilon: float, samples: int | None = None, neurons: int | None = None
    ) -> LayerProblem:
        """See `lenet.problem`."""
        return lenet.problem(layer, epsilon, samples or self.samples, self.data, self.out, neurons)


def lenet_layers(settings: Settings) -> Iterator[Row]:
    """All layers at three radii, with the default options of ADMM: steps, seconds and certificate."""
    for layer in (1, 2, 3):
        for epsilon in (0.02, 0.1, 0.3):
            problem = settings.problem(layer, epsilon)
            instance = _instance(problem, layer, epsilon)
            yield _certified_row("lenet", instance, "ours", *ours.solve_timed(problem, ADMM()))


def peers(settings: Settings) -> Iterator[Row]:
    """Time until the gap to the optimum and the violation are within the tolerance, for ADMM and the authors' solver.

    The ratio is to the time of ADMM on the CPU. These instances are too large for the cone solvers; see `cone`.
    """
    for layer in settings.layers:
        problem = settings.problem(layer, settings.epsilon)
        instance = _instance(problem, layer, settings.epsilon)
        known = reference(problem)
        yield _reference_row("peers", instance, known)
        solution, seconds = ours.solve_timed(problem, ADMM())
        yield _certified_row("peers", instance, "ours, certified", solution, seconds)
        ours_seconds = None
        for device, tf32 in (("cpu", False), ("cpu", True), ("cuda", False), ("cuda", True)):
            solver = f"ours, {device}{' TF32' * tf32}"
            try:
                trials = ours.solve(problem, device, tf32, tolerance=TOLERANCE / 10)
                run = run_until_tolerance(known.score_trials(problem, trials))
            except Unavailable as reason:
                yield Row("peers", instance, solver, note=f"skipped: {reason}")
                continue
            yield from _trace_rows(instance, solver, run)
            row = _result_row("peers", instance, solver, run, ours_seconds)
            ours_seconds = row.seconds if ours_seconds is None else ours_seconds
            yield row
        yield from _authors_rows(settings, problem, instance, known, ours_seconds)


def _authors_rows(
    settings: Settings, problem: LayerProblem, instance: str, known: Reference, ours_seconds: float | None
) -> Iterator[Row]:
    """The authors' solver at each ρ, with the number of threads that is fastest, then the fastest of these runs."""
    finished = []
    try:
        threads = min(
            (1, None), key=lambda t: next(authors.solve(problem, settings.authors, AUTHORS_RHOS[0], (20,), t)).seconds
        )
    except Unavailable as reason:
        yield Row("peers", instance, "authors", note=f"skipped: {reason}")
        return
    for rho in AUTHORS_RHOS:
        solver = f"authors, ρ={rho}"

        def scored(counts: tuple[int, ...], rho: int = rho) -> Iterator[ScoredTrial]:
            return known.score_trials(problem, authors.solve(problem, settings.authors, rho, counts, threads))

        run = run_until_tolerance(scored(AUTHORS_STEPS), 60 * settings.minutes)
        run = bisect_steps(run, lambda count, scored=scored: next(scored((count,))))
        yield from _trace_rows(instance, solver, run)
        row = _result_row("peers", instance, solver, run, ours_seconds)
        yield row
        if any(map(is_within_tolerance, run)):
            finished.append(row)
    if finished:
        yield replace(min(finished, key=lambda row: row.seconds), solver="authors, best ρ")


def cone(settings: Settings) -> Iterator[Row]:
    """General cone solvers on instances of increasing size, each until it fails; the ratio is to the time of ADMM."""
    layer, epsilon, active = settings.layers[0], settings.epsilon, [cvxpy_clarabel, cvxpy_scs]
    for samples, neurons in _increasing_sizes(*settings.problem(layer, epsilon).Y.shape):
        if samples * neurons < settings.min_size:
            continue
        problem = settings.problem(layer, epsilon, samples, neurons)
        instance = _instance(problem, layer, epsilon)
        known = reference(problem)
        yield _reference_row("cone", instance, known)
        run = run_until_tolerance(known.score_trials(problem, ours.solve(problem, tolerance=TOLERANCE / 10)))
        ours_row = _result_row("cone", instance, "ours, cpu", run)
        yield ours_row
        for peer in list(active):
            try:
                run = run_until_tolerance(known.score_trials(problem, peer.solve(problem, settings.minutes)))
            except (Unavailable, TimedOut) as reason:
                yield Row("cone", instance, peer.NAME, note=f"stopped: {reason}")
                active.remove(peer)
                continue
            yield _result_row("cone", instance, peer.NAME, run, ours_row.seconds)
            if not is_within_tolerance(run[-1]):
                active.remove(peer)
        if not active:
            break


def _increasing_sizes(max_samples: int, max_neurons: int) -> Iterator[tuple[int, int]]:
    """Samples and neurons, one of them doubled at a time, up to the whole layer."""
    samples, neurons = min(250, max_samples), min(10, max_neurons)
    yield samples, neurons
    while (samples, neurons) != (max_samples, max_neurons):
        if samples < max_samples and (samples <= 25 * neurons or neurons == max_neurons):
            samples = min(2 * samples, max_samples)
        else:
            neurons = min(2 * neurons, max_neurons)
        yield samples, neurons


def step(settings: Settings) -> Iterator[Row]:
    """One step of ADMM; the ratio is to the time of the two products with X that it contains."""
    sizes = [(10_000, 785, 300, "cpu", False), (10_000, 301, 100, "cpu", False), (8192, 4096, 4096, "cuda", True)]
    for P, N, M, device, tf32 in sizes:
        yield _step_row("step", _scaled_size(settings, P, N, M), device, tf32)


def scaling(settings: Settings) -> Iterator[Row]:
    """One step of ADMM on the CPU, with twice as many samples, inputs or outputs."""
    for P, N, M in ((2048, 256, 128), (4096, 256, 128), (2048, 512, 128), (2048, 256, 256), (4096, 512, 256)):
        yield _step_row("scaling", _scaled_size(settings, P, N, M), "cpu", False)


def path(settings: Settings) -> Iterator[Row]:
    """Ten radii by `solve_path`, far apart and close; the ratio is to the mean time of a solve without warm start."""
    layer = settings.layers[0]
    problem = settings.problem(layer, settings.epsilon)
    norm = torch.linalg.matrix_norm(problem.Y)
    sequences = {"0.05 to 0.2": [0.05 * 4 ** (i / 9) for i in range(10)], "close": [0.08 * 1.05**i for i in range(10)]}
    for name, relative in sequences.items():
        epsilons = [epsilon * norm for epsilon in relative]
        cold = [ours.solve_timed(replace(problem, epsilon=epsilon), ADMM()) for epsilon in epsilons]
        clock = Clock()
        warm = solve_path(problem, epsilons, ADMM())
        seconds, cold_seconds = clock.read(), sum(s for _, s in cold) / len(cold)
        cold_steps, path_steps = sum(int(s.steps) for s, _ in cold) / len(cold), sum(int(s.steps) for s in warm)
        instance = f"layer {layer}, ten radii, {name}"
        converged = sum(int(s.status) == Status.CONVERGED for s in warm)
        yield Row("path", instance, "cold solve", round(cold_steps), cold_seconds, note="mean of ten")
        note = (
            f"ratio to one cold solve, {path_steps / cold_steps:.2f} in steps;"
            f" {converged} of {len(warm)} radii converged"
        )
        yield Row("path", instance, "path", path_steps, seconds, ratio=seconds / cold_seconds, note=note)


SECTIONS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "lenet": lenet_layers,
    "peers": peers,
    "cone": cone,
    "step": step,
    "path": path,
    "scaling": scaling,
}


def _instance(problem: LayerProblem, layer: int, epsilon: float) -> str:
    """The name of an instance: layer, P × N × M, and the relative radius."""
    P, N, M = *problem.X.shape, problem.Y.shape[-1]
    return f"layer {layer} {P}x{N}x{M} ε={epsilon:g}"


def _certified_row(section: str, instance: str, solver: str, solution: Solution, seconds: float) -> Row:
    """The row of a solution whose gap is its certified duality gap."""
    status, gap, violation = Status(int(solution.status)).name, float(solution.gap), float(solution.violation)
    note = f"{status}, gap to the lower bound"
    return Row(section, instance, solver, int(solution.steps), seconds, gap, violation, note=note)


def _reference_row(section: str, instance: str, known: Reference) -> Row:
    """The row of the reference optimum."""
    note = f"optimum {known.optimum:.8g}, known up to this gap"
    return Row(section, instance, "reference", seconds=known.seconds, gap=known.gap, note=note)


def _trace_rows(instance: str, solver: str, run: list[ScoredTrial]) -> Iterator[Row]:
    """One row for each trial of a run, for the plot."""
    for trial, score in run:
        yield Row("trace", instance, solver, trial.steps, trial.seconds, score.gap, score.violation)


def _result_row(
    section: str, instance: str, solver: str, run: list[ScoredTrial], ours_seconds: float | None = None
) -> Row:
    """The row of the first trial within the tolerance or, if there is none, of the last trial with a note."""
    trial, score = next(filter(is_within_tolerance, run), run[-1])
    note = "" if is_within_tolerance((trial, score)) else f"not within {TOLERANCE:g}"
    if ours_seconds:
        note = ", ".join(filter(None, ("ratio to ours on the CPU", note)))
    ratio = trial.seconds / ours_seconds if ours_seconds else None
    return Row(section, instance, solver, trial.steps, trial.seconds, score.gap, score.violation, ratio, note)


def _step_row(section: str, size: tuple[int, int, int], device: str, tf32: bool) -> Row:
    """The row of the time of one step."""
    instance, solver = "x".join(map(str, size)), f"a step, {device}{' TF32' * tf32}"
    try:
        cost = step_cost(*size, device, tf32)
    except Unavailable as reason:
        return Row(section, instance, solver, note=f"skipped: {reason}")
    note = f"ratio to its two products; {cost.gflops:.3g} GFLOP/s"
    return Row(section, instance, solver, 1, cost.step, ratio=cost.ratio, note=note)


def _scaled_size(settings: Settings, *size: int) -> tuple[int, ...]:
    """The size, divided by eight if ``settings.small``."""
    return tuple(s // 8 for s in size) if settings.small else size
