"""CUDA tensors without a GPU, and a record of the operators at which the host waits for the device.

`fake_cuda` gives tensors without values, as `torch.compile` uses them: enough for code whose control flow and shapes do
not depend on data. `CudaTensor` also has values, computed on the CPU, so that whole solves run as they would on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_nettrim import LayerProblem

PACKAGE = Path(__file__).parents[1] / "lightning_nettrim"
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal}
SHAPES = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
FACTORIZATIONS = {aten._linalg_eigh, aten._linalg_svd, aten.linalg_pinv, aten.cholesky_inverse}
"""They read whether the factorization has succeeded. `aten.linalg_cholesky_ex` leaves that to the caller."""


def synchronization(func, args, kwargs) -> str | None:
    """How an operator makes the host wait for the device; ``None`` if it does not.

    ``read``: of a number. ``shape``: the size of the result depends on data. ``factorization``: reads its success.
    ``to host``, ``to device``: a copy for which the host waits.
    """
    operator = func.overloadpacket
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    on_device = [t for t in tensors if t.device.type == "cuda"]
    if operator is aten._to_copy:
        target = torch.device(kwargs.get("device") or tensors[0].device).type
        if target == "cuda" and not on_device:
            return None if kwargs.get("non_blocking") else "to device"
        return "to host" if on_device and target == "cpu" else None
    if operator is aten.copy_ and len(on_device) == 1:
        return "to device" if on_device[0] is args[0] else "to host"
    if not on_device:
        return None
    if operator in READS:
        return "read"
    masked = operator in INDEXED and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if masked or operator in SHAPES or func is aten.repeat_interleave.Tensor:
        return "shape"
    return "factorization" if operator in FACTORIZATIONS else None


class Synchronizations(TorchDispatchMode):
    """Counts the operators at which the host waits, by the function of the package that calls them and by their kind.

    Attributes:
        found: ``{(function, kind): count}``.
    """

    def __init__(self):
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = synchronization(func, args, kwargs or {})
        if kind is not None:
            self.found[_calling_function(), kind] += 1
        return func(*args, **(kwargs or {}))


def _calling_function() -> str:
    """The innermost function of the package on the stack, as ``solvers.base.iterate``."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents and not frame.f_code.co_name.startswith("<"):
            module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the package"


@contextmanager
def fake_cuda() -> Iterator[Synchronizations]:
    """A `with` in which tensors, also those on CUDA, have no values; its value is the record.

    Sizes that depend on data are symbols, and so are numbers that are read; a branch on one of them raises.
    """
    shapes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    with torch.no_grad(), FakeTensorMode(shape_env=shapes), Synchronizations() as record:
        yield record


def without_values(problem: LayerProblem) -> LayerProblem:
    """The problem on CUDA; within `fake_cuda`."""
    return _map(problem, lambda t: torch.empty(t.shape, dtype=t.dtype, device=CUDA))


class CudaTensor(Tensor):
    """A tensor on CUDA whose values are computed on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values):
        size, strides, offset = values.shape, values.stride(), values.storage_offset()
        tensor = Tensor._make_wrapper_subclass(cls, size, strides, offset, dtype=values.dtype, device=CUDA)
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self):
        return f"CudaTensor({self.values})"


class _OnCuda(TorchDispatchMode):
    """Creates `CudaTensor` where a tensor on CUDA is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    """Run an operator on the CPU; its results are on CUDA if its arguments are, or if it is told so."""
    leaves = tree_leaves((args, kwargs))
    given = [t for t in leaves if isinstance(t, CudaTensor)]
    device = kwargs.get("device")
    on_cuda = bool(given) if device is None else torch.device(device).type == "cuda"
    operator = func.overloadpacket
    if given and operator not in {aten._to_copy, aten.copy_} | INDEXED:
        strangers = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, CudaTensor) and t.dim()]
        if strangers:
            raise RuntimeError(f"{func}: expected all tensors on CUDA, got one of shape {tuple(strangers[0].shape)}")
    if operator is aten.copy_:
        on_cuda = isinstance(args[0], CudaTensor)
    known = {id(t.values): t for t in given}
    args, kwargs = tree_map(lambda t: t.values if isinstance(t, CudaTensor) else t, (args, kwargs))
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if operator is aten._to_copy and device is not None and on_cuda is not bool(given):
        kwargs.pop("non_blocking", None)
        out = func(*args, **kwargs).clone()
    else:
        out = func(*args, **kwargs)

    def wrap(t):
        if not isinstance(t, Tensor) or not on_cuda:
            return t
        return known[id(t)] if id(t) in known else CudaTensor(t)

    return tree_map(wrap, out)


@contextmanager
def cuda_with_values() -> Iterator[Synchronizations]:
    """A `with` in which tensors on CUDA are computed on the CPU; its value is the record."""
    torch._C._ensureCUDADeviceGuardSet()
    with patch("torch.cuda._lazy_init"), torch.no_grad(), _OnCuda(), Synchronizations() as record:
        yield record


def on_cuda(problem: LayerProblem) -> LayerProblem:
    """The problem on CUDA, with its values."""
    return _map(problem, lambda t: CudaTensor(t.clone()))


def _map(problem: LayerProblem, function) -> LayerProblem:
    """The problem with a function applied to every tensor."""
    tensors = {f.name: getattr(problem, f.name) for f in fields(problem)}
    return replace(problem, **{name: function(t) for name, t in tensors.items() if isinstance(t, Tensor)})
