"""The outputs of exported networks."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers import Unavailable


@torch.no_grad()
def exported_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The outputs after `torch.export`."""
    return torch.export.export(model, (images,)).module()(images)


@torch.no_grad()
def onnx_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The outputs in ONNX Runtime.

    Raises:
        Unavailable: without the packages of the extra ``onnx``.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed: pip install lightning_nettrim[onnx]") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter uses deprecated functions of PyTorch
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(path, external_data=True)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(outputs)
