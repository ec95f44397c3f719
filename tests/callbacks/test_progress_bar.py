"""Progress bars of the Trainer, in and after pruning."""

import time

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from trainers import LIGHTNING_WARNINGS, MetricsNet, Net, half, make_trainer, train_data, val_data

pytestmark = LIGHTNING_WARNINGS


def test_the_hooks_of_a_bar_are_not_called_in_the_two_validations(tmp_path):
    class CountsValidations(TQDMProgressBar):
        validations = 0

        def on_validation_start(self, trainer, pl_module):
            self.validations += 1
            super().on_validation_start(trainer, pl_module)

    bar = CountsValidations()
    make_trainer(tmp_path, half(), bar, enable_progress_bar=True, num_sanity_val_steps=0).fit(
        Net(), train_data(), val_data()
    )
    assert bar.validations == 2


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_a_bar_works_during_pruning_and_in_validations_after_it(tmp_path, bar, capfd):
    class SlowValidation(MetricsNet):
        """Validates long enough for a bar to be drawn meanwhile."""

        def calibration_step(self, batch):
            self(batch[0])

        def validation_step(self, batch, batch_idx):
            time.sleep(0.15)  # the bar of rich is drawn ten times a second
            super().validation_step(batch, batch_idx)

    callback, shown = half(), bar(refresh_rate=1)
    trainer = make_trainer(
        tmp_path, shown, callback, enable_progress_bar=True, max_epochs=1, limit_val_batches=2, num_sanity_val_steps=0
    )
    trainer.fit(model := SlowValidation())
    (metrics,) = trainer.validate(model)
    assert metrics["val_loss"] == pytest.approx(callback.metrics["pruned"]["val_loss"])
    output = capfd.readouterr()
    assert "Traceback" not in output.out + output.err
    assert "fc1: sparsity 50.0%" in output.out
    assert trainer.progress_bar_callback is shown
