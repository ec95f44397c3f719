"""A checkpoint of a dense network."""

import pytest
from trainers import Net, make_trainer, train_data, val_data


@pytest.fixture
def dense_checkpoint(tmp_path):
    """Of a network trained without the callback."""
    trainer = make_trainer(tmp_path)
    trainer.fit(Net(), train_data(), val_data())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    return tmp_path / "dense.ckpt"
