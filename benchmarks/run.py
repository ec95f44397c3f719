"""The entry point: ``python -m benchmarks.run convex`` prints a table and writes it as CSV and as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import convex, llama, memory, networks, oneshot, processes
from benchmarks.peers import Unavailable
from benchmarks.picture import draw, draw_accuracy
from benchmarks.report import Row, header, line, titles, write


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections that are asked for, in order; the CSV is complete up to the last row printed.

    Args:
        arguments: of the command line; this process's if not given.
    """
    settings = vars(_parser().parse_args(arguments))
    benchmark = settings.pop("benchmark")
    if benchmark == "oneshot":
        chosen = oneshot.Settings(**{**settings, "budgets": tuple(settings["budgets"])})
        rows = _pruning(oneshot, chosen, benchmark)
        try:
            draw_accuracy(rows, chosen.out / "oneshot.png")
        except Unavailable as reason:
            print(reason)
        return
    if benchmark == "networks":
        several = {name: tuple(settings[name]) for name in ("networks", "budgets")}
        _pruning(networks, networks.Settings(**{**settings, **several}), benchmark)
        return
    if benchmark == "llama":
        _pruning(llama, llama.Settings(**{**settings, "budgets": tuple(settings["budgets"])}), benchmark)
        return
    if benchmark == "memory":
        several = {name: tuple(settings[name]) for name in ("limits", "targets")}
        _pruning(memory, memory.Settings(**{**settings, **several}), benchmark)
        return
    if benchmark == "ranks":
        _pruning(processes, processes.Settings(**{**settings, "processes": tuple(settings["processes"])}), benchmark)
        return
    sections = settings.pop("sections")
    _convex(sections, convex.Settings(**{**settings, "layers": tuple(settings["layers"])}))


def _convex(sections: Sequence[str], settings: convex.Settings) -> None:
    print(header(torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA"))
    print(titles())
    rows: list[Row] = []
    for section in sections:
        for row in convex.SECTIONS[section](settings):
            rows.append(row)
            write(rows, settings.out / "convex.csv")
            if row.section != "trace":
                print(line(row), flush=True)
    try:
        draw(rows, settings.out / "convex.png")
    except Unavailable as reason:
        print(reason)


def _pruning(benchmark: Any, settings: Any, name: str) -> list[Any]:
    """The rows of a benchmark of pruned networks, each printed and written as it is measured, and its table."""
    print(header("CPU"))
    rows: list[Any] = []
    for row in benchmark.rows(settings):
        rows.append(row)
        write(rows, settings.out / f"{name}.csv")
        print(row, flush=True)
    print("\n" + benchmark.table(rows))
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    command = commands.add_parser("convex", help="the convex program, by this package and by its peers")
    default = convex.Settings()
    command.add_argument("--data", help="folder of MNIST; $NETTRIM_DATA or ./data if not given")
    command.add_argument("--out", type=Path, default=default.out, help="folder of the results (default %(default)s)")
    command.add_argument("--authors", type=Path, help="folder of a clone of github.com/DNNToolBox/Net-Trim")
    command.add_argument("--samples", type=int, default=default.samples, help="default %(default)s")
    command.add_argument("--gain", type=float, default=default.gain, help="ε over the response's norm, %(default)s")
    command.add_argument("--layers", type=int, nargs="+", default=[*default.layers], choices=(1, 2, 3))
    command.add_argument("--sections", nargs="+", default=[*convex.SECTIONS], choices=[*convex.SECTIONS])
    command.add_argument("--minutes", type=float, default=default.minutes, help="for a peer's run (%(default)s)")
    command.add_argument("--least", type=int, default=default.least, help="samples × neurons cone starts from")
    command.add_argument("--small", action="store_true", help="sizes of step and growth an eighth")
    command = commands.add_parser("oneshot", help="pruning without retraining, by every method")
    basic = oneshot.Settings()
    command.add_argument("--data", help="folder of MNIST; $NETTRIM_DATA or ./data if not given")
    command.add_argument("--out", type=Path, default=basic.out, help="folder of the results (default %(default)s)")
    command.add_argument("--alps", type=Path, help="folder of a clone of github.com/mazumder-lab/ALPS")
    command.add_argument("--sparsegpt", type=Path, help="folder of a clone of github.com/IST-DASLab/sparsegpt")
    command.add_argument("--wanda", type=Path, help="folder of a clone of github.com/locuslab/wanda")
    command.add_argument("--seeds", type=int, default=basic.seeds, help="networks (default %(default)s)")
    command.add_argument("--epochs", type=int, default=basic.epochs, help="of training (default %(default)s)")
    command.add_argument("--samples", type=int, default=basic.samples, help="images (default %(default)s)")
    command.add_argument("--budgets", nargs="+", default=[*basic.budgets], help="sparsities and n:m patterns")
    command = commands.add_parser("networks", help="the networks of the recipes, by every method")
    small = networks.Settings()
    command.add_argument("--data", help="folder of MNIST; $NETTRIM_DATA or ./data if not given")
    command.add_argument("--out", type=Path, default=small.out, help="folder of the results (default %(default)s)")
    command.add_argument("--alps", type=Path, help="folder of a clone of github.com/mazumder-lab/ALPS")
    command.add_argument("--networks", nargs="+", default=[*small.networks], choices=[*small.networks])
    command.add_argument("--epochs", type=int, help="of training; those of the recipes if not given")
    command.add_argument("--samples", type=int, default=small.samples, help="images (default %(default)s)")
    command.add_argument("--budgets", type=float, nargs="+", default=[*small.budgets], help="sparsities")
    command = commands.add_parser("llama", help="the recipe's small Llama on characters, by every method")
    text = llama.Settings()
    command.add_argument("--out", type=Path, default=text.out, help="folder of the results (default %(default)s)")
    command.add_argument("--epochs", type=int, help="of training; those of the recipe if not given")
    command.add_argument("--samples", type=int, default=text.samples, help="windows of text (default %(default)s)")
    command.add_argument("--budgets", type=float, nargs="+", default=[*text.budgets], help="sparsities")
    command = commands.add_parser("memory", help="the peak while a large network is pruned, against max_memory")
    large = memory.Settings()
    command.add_argument("--out", type=Path, default=large.out, help="folder of the results (default %(default)s)")
    command.add_argument("--network", default=large.network, help="of torchvision (default %(default)s)")
    command.add_argument("--limits", type=float, nargs="+", default=[*large.limits], help="GiB")
    command.add_argument("--offload", default=large.offload, choices=("device", "cpu", "disk"))
    command.add_argument("--scheme", default=large.scheme, choices=("cascade", "parallel"))
    command.add_argument("--targets", nargs="+", default=[], help="layers to prune, by name or glob; all if not given")
    for name in ("images", "size", "batch", "samples"):
        command.add_argument(f"--{name}", type=int, default=getattr(large, name), help="default %(default)s")
    command = commands.add_parser("ranks", help="a step against the number of processes that share the rows")
    spread = processes.Settings()
    command.add_argument("--out", type=Path, default=spread.out, help="folder of the results (default %(default)s)")
    command.add_argument("--processes", type=int, nargs="+", default=[*spread.processes])
    for name in ("samples", "inputs", "outputs"):
        command.add_argument(f"--{name}", type=int, default=getattr(spread, name), help="default %(default)s")
    return parser


if __name__ == "__main__":
    main()
