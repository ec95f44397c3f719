"""The callback as a class of `pytorch_lightning`, for what asks for one, as its LightningCLI does."""

from __future__ import annotations

import pytorch_lightning

from lightning_nettrim.callbacks.nettrim import NetTrim as _NetTrim


class NetTrim(_NetTrim, pytorch_lightning.Callback):
    """`lightning_nettrim.NetTrim`, with all its arguments, that is a callback of `pytorch_lightning` too."""
