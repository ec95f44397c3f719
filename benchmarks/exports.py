"""Exported networks: what they compute, compared with the network itself."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers import Unavailable


@torch.no_grad()
def exported_error(model: nn.Module, images: Tensor) -> float:
    """The error of the outputs after `torch.export`, relative to their norm."""
    outputs = model(images)
    exported = torch.export.export(model, (images,)).module()
    return float((exported(images) - outputs).norm() / outputs.norm())


@torch.no_grad()
def onnx_error(model: nn.Module, images: Tensor) -> float:
    """The error of the outputs in ONNX Runtime, relative to their norm.

    Raises:
        Unavailable: without the packages of the extra ``onnx``.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed: pip install lightning_nettrim[onnx]") from error
    outputs, options = model(images), onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(path, external_data=True)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (result,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return float((torch.from_numpy(result) - outputs).norm() / outputs.norm())
