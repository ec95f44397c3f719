"""Command line of the benchmarks, such as ``python -m benchmarks.run convex``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    compaction,
    convex,
    coreset,
    layer_cost,
    llama,
    memory,
    networks,
    oneshot,
    pitch,
    processes,
    units,
)
from benchmarks.peers import Unavailable
from benchmarks.plots import plot_accuracy, plot_convergence, plot_coresets
from benchmarks.report import Row, column_titles, header, line, write

BENCHMARKS = {
    "convex": convex,
    "oneshot": oneshot,
    "networks": networks,
    "llama": llama,
    "pitch": pitch,
    "units": units,
    "coreset": coreset,
    "compaction": compaction,
    "memory": memory,
    "layer_cost": layer_cost,
    "processes": processes,
}

PLOTS = {"oneshot": plot_accuracy, "coreset": plot_coresets}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one benchmark; the CSV file is rewritten after every row.

    Args:
        arguments: arguments of the command line; ``None`` is those of the process.
    """
    options = vars(_parser().parse_args(arguments))
    name = options.pop("benchmark")
    sections = options.pop("sections", ()) if name == "convex" else ()
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    settings = BENCHMARKS[name].Settings(**options)
    if name == "convex":
        _run_convex(sections, settings)
        return
    rows = _run_pruning(BENCHMARKS[name], settings, "latency" if options.get("latency") else name)
    if (plot := PLOTS.get(name)) is not None:
        try:
            plot(rows, settings.out / f"{name}.png")
        except Unavailable as reason:
            print(reason)


def _run_convex(sections: Sequence[str], settings: convex.Settings) -> None:
    """Print and write the rows of the sections, in the given order, and plot the convergence."""
    print(header(torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA"))
    print(column_titles())
    rows: list[Row] = []
    for section in sections:
        for row in convex.SECTIONS[section](settings):
            rows.append(row)
            write(rows, settings.out / "convex.csv")
            if row.section != "trace":
                print(line(row), flush=True)
    try:
        plot_convergence(rows, settings.out / "convex.png")
    except Unavailable as reason:
        print(reason)


def _run_pruning(benchmark: Any, settings: Any, name: str) -> list[Any]:
    """Print and write each row of a benchmark when it is measured, then print its table."""
    print(header("CPU"))
    rows: list[Any] = []
    for row in benchmark.rows(settings):
        rows.append(row)
        write(rows, settings.out / f"{name}.csv")
        print(row, flush=True)
    print("\n" + benchmark.table(rows))
    return rows


def _parser() -> argparse.ArgumentParser:
    """One subcommand per benchmark; the options are the fields of its ``Settings``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)

    command = commands.add_parser("convex", help="the convex program, by this package and by other solvers")
    default: Any = convex.Settings()
    _add_data(command)
    _add_out(command, default)
    command.add_argument("--authors", type=Path, help="folder of a clone of github.com/DNNToolBox/Net-Trim")
    _add_integer(command, default, "samples", "number of training images")
    command.add_argument("--epsilon", type=float, default=default.epsilon, help="relative to ‖Y‖ (default %(default)s)")
    command.add_argument("--layers", type=int, nargs="+", default=[*default.layers], choices=(1, 2, 3))
    command.add_argument("--sections", nargs="+", default=[*convex.SECTIONS], choices=[*convex.SECTIONS])
    command.add_argument(
        "--minutes", type=float, default=default.minutes, help="time limit of another solver (default %(default)s)"
    )
    _add_integer(command, default, "min-size", "least samples × neurons of the section cone")
    command.add_argument("--small", action="store_true", help="sizes of the sections step and scaling divided by 8")

    command = commands.add_parser("oneshot", help="LeNet-300-100 on MNIST without retraining, by every method")
    default = oneshot.Settings()
    _add_data(command)
    _add_out(command, default)
    command.add_argument("--alps", type=Path, help="folder of a clone of github.com/mazumder-lab/ALPS")
    command.add_argument("--sparsegpt", type=Path, help="folder of a clone of github.com/IST-DASLab/sparsegpt")
    command.add_argument("--wanda", type=Path, help="folder of a clone of github.com/locuslab/wanda")
    _add_integer(command, default, "seeds", "number of networks")
    _add_integer(command, default, "epochs", "number of training epochs")
    _add_integer(command, default, "samples", "number of calibration images")
    command.add_argument("--budgets", nargs="+", default=[*default.budgets], help="sparsities and n:m patterns")

    command = commands.add_parser("networks", help="the networks of the recipes without retraining, by every method")
    default = networks.Settings()
    _add_data(command)
    _add_out(command, default)
    command.add_argument("--alps", type=Path, help="folder of a clone of github.com/mazumder-lab/ALPS")
    command.add_argument("--networks", nargs="+", default=[*default.networks], choices=[*default.networks])
    command.add_argument("--epochs", type=int, help="number of training epochs; default: that of the recipe")
    _add_integer(command, default, "samples", "number of calibration images")
    command.add_argument("--budgets", type=float, nargs="+", default=[*default.budgets], help="sparsities")
    command.add_argument("--methods", nargs="+", default=[], choices=[*networks.METHODS], help="default: all")

    command = commands.add_parser("llama", help="the small Llama of the recipe without retraining, by every method")
    default = llama.Settings()
    _add_out(command, default)
    command.add_argument("--epochs", type=int, help="number of training epochs; default: that of the recipe")
    _add_integer(command, default, "samples", "number of calibration windows")
    command.add_argument("--budgets", type=float, nargs="+", default=[*default.budgets], help="sparsities")
    command.add_argument("--methods", nargs="+", default=[], choices=[*llama.METHODS], help="default: all")

    command = commands.add_parser("pitch", help="a 1-D convolutional network without retraining, by every method")
    default = pitch.Settings()
    _add_out(command, default)
    _add_integer(command, default, "epochs", "number of training epochs")
    _add_integer(command, default, "samples", "number of calibration frames")
    command.add_argument("--budgets", type=float, nargs="+", default=[*default.budgets], help="sparsities")
    command.add_argument("--methods", nargs="+", default=[], choices=[*pitch.METHODS], help="default: all")

    command = commands.add_parser("units", help="whole units removed, by this package and by Torch-Pruning's criteria")
    default = units.Settings()
    _add_data(command)
    _add_out(command, default)
    command.add_argument("--networks", nargs="+", default=[*default.networks], choices=[*default.networks])
    _add_integer(command, default, "samples", "number of calibration images")
    command.add_argument("--budgets", type=float, nargs="+", default=[*default.budgets], help="fractions of the MACs")
    _add_integer(command, default, "finetune", "epochs of fine-tuning after pruning")
    command.add_argument("--methods", nargs="+", default=[], choices=[*units.METHODS], help="default: all")

    command = commands.add_parser("coreset", help="the error of coresets of neurons by their size")
    default = coreset.Settings()
    _add_out(command, default)
    _add_integer(command, default, "neurons", "number of neurons")
    command.add_argument("--sizes", type=int, nargs="+", default=[*default.sizes], help="numbers of neurons kept")
    _add_integer(command, default, "seeds", "number of samples of each size")

    command = commands.add_parser("compaction", help="torchvision's networks without every second unit of each group")
    default = compaction.Settings()
    _add_out(command, default)
    command.add_argument("--networks", nargs="+", default=[], help="networks of torchvision; default: all")
    command.add_argument("--onnx", action="store_true", help="run each compact network in ONNX Runtime, too")
    _add_integer(command, default, "largest", "millions of parameters up to which a network is run")
    command.add_argument("--latency", action="store_true", help="time of a forward pass, in place of all this")

    command = commands.add_parser("memory", help="peak memory while a large network is pruned, by max_memory")
    default = memory.Settings()
    _add_out(command, default)
    command.add_argument("--network", default=default.network, help="torchvision model (default %(default)s)")
    command.add_argument("--limits", type=float, nargs="+", default=[], help="max_memory, in GiB")
    command.add_argument(
        "--larger-than-memory", action="store_true", help="a Llama with its weights on disk, in place of --network"
    )
    _add_integer(command, default, "dim", "features of this Llama")
    _add_integer(command, default, "depth", "blocks of this Llama")
    command.add_argument("--offload", default=default.offload, choices=("device", "cpu", "disk"))
    command.add_argument("--scheme", default=default.scheme, choices=("cascade", "parallel"))
    command.add_argument("--targets", nargs="+", default=[], help="layers to prune, by name or glob; default: all")
    _add_integer(command, default, "images", "number of random images")
    _add_integer(command, default, "size", "height and width of an image, in pixels")
    _add_integer(command, default, "batch", "number of images per batch")
    _add_integer(command, default, "samples", "num_samples of trim")

    command = commands.add_parser(
        "layer_cost", help="time and peak memory of one layer by its size, and their exponents"
    )
    default = layer_cost.Settings()
    _add_out(command, default)
    command.add_argument("--sections", nargs="+", default=[*default.sections], choices=[*layer_cost.SIZES])
    command.add_argument("--methods", nargs="+", default=[], choices=[*layer_cost.METHODS], help="default: all")
    _add_integer(command, default, "largest", "most entries of X, W or Y")
    _add_integer(command, default, "steps", "steps of Cardinality")

    command = commands.add_parser("processes", help="step time by the number of processes that share the rows")
    default = processes.Settings()
    _add_out(command, default)
    command.add_argument("--processes", type=int, nargs="+", default=[*default.processes], help="numbers of processes")
    _add_integer(command, default, "samples", "rows, in total and per process")
    _add_integer(command, default, "inputs", "inputs of the layer")
    _add_integer(command, default, "outputs", "outputs of the layer")
    return parser


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", help="folder of MNIST; default: $NETTRIM_DATA or ./data")


def _add_out(command: argparse.ArgumentParser, default: Any) -> None:
    command.add_argument("--out", type=Path, default=default.out, help="folder of the results (default %(default)s)")


def _add_integer(command: argparse.ArgumentParser, default: Any, name: str, text: str) -> None:
    value = getattr(default, name.replace("-", "_"))
    command.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default %(default)s)")


if __name__ == "__main__":
    main()
