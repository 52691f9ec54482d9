"""What accompanies a training: checkpoints, the progress bar, a report of what it cost."""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from lightning_knnmt.files import write_atomically


class ModelCheckpoint(pl.callbacks.ModelCheckpoint):
    """Lightning's, except that its state follows a run's folder that was moved.

    Lightning forgets the best score when the folder has another path, so that the next validation
    would overwrite the best checkpoint.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        old, new = state_dict.get("dirpath"), self.dirpath
        if old and new and old != new:

            def moved(path: str) -> str:
                return os.path.join(new, os.path.relpath(path, old)) if path else path

            paths = ("best_model_path", "kth_best_model_path", "last_model_path")
            best_models = state_dict["best_k_models"]
            state_dict = {
                **state_dict,
                **{name: moved(state_dict[name]) for name in paths},
                "best_k_models": {moved(path): score for path, score in best_models.items()},
                "dirpath": new,
            }
        super().load_state_dict(state_dict)


class ProgressBar(RichProgressBar):
    """Lightning's, without the logger's version among the metrics."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


@dataclass(frozen=True)
class TrainingCost:
    """What a training took, and what came of it.

    Attributes:
        trained_parameters: Number of trained parameters; shared ones count once.
        parameters: Number of the model's parameters.
        steps: Steps of the optimizer.
        seconds: From the first to the last step, with validations, without interruptions.
        cpu_seconds: Processor time of all threads of this process. It is the steadier measure if
            other programs use the cores too.
        best_score: The best checkpoint's value of what it was chosen by; None without a finite one.
        val_loss: The lowest validation loss in nats a token; None without a validation.
        val_bleu: Greedy BLEU in that validation; None if it was not computed.
    """

    trained_parameters: int
    parameters: int
    steps: int
    seconds: float
    cpu_seconds: float
    best_score: float | None
    val_loss: float | None
    val_bleu: float | None


class TrainingReport(pl.Callback):
    """Writes a `TrainingCost` when training ends; a resumed run's seconds add up."""

    def __init__(self, path: Path | str) -> None:
        """
        Args:
            path: A JSON file.
        """
        self.path = Path(path)
        self._before = (0.0, 0.0)  # of the runs that this one resumes
        self._started: tuple[float, float] | None = None
        self._best: dict[str, float] = {}  # val_loss and val_bleu of the best validation

    @property
    def seconds(self) -> tuple[float, float]:
        """Time spent in training so far: wall time and processor time."""
        if self._started is None:
            return self._before
        clock, processor = (now - start for now, start in zip(_now(), self._started, strict=True))
        return self._before[0] + clock, self._before[1] + processor

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = _now()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # If a run died after its last step, a resumed one has nothing left to train, and Lightning
        # then skips the end of training.
        if not self.path.exists():
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        names: tuple[str, ...] = ("val_loss", "val_bleu")
        now = {name: float(metrics[name]) for name in names if name in metrics}
        if now.get("val_loss", math.inf) < self._best.get("val_loss", math.inf):
            self._best = now

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        groups = [group for each in trainer.optimizers for group in each.param_groups]
        best = getattr(trainer.checkpoint_callback, "best_model_score", None)
        cost = TrainingCost(
            trained_parameters=sum(p.numel() for group in groups for p in group["params"]),
            parameters=sum(p.numel() for p in pl_module.parameters()),
            steps=trainer.global_step,
            seconds=self.seconds[0],
            cpu_seconds=self.seconds[1],
            best_score=float(best) if best is not None and math.isfinite(best) else None,
            val_loss=self._best.get("val_loss"),
            val_bleu=self._best.get("val_bleu"),
        )
        write_atomically(self.path, json.dumps(asdict(cost), indent=2, allow_nan=False) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        clock, processor = state_dict["seconds"]
        self._before = (clock, processor)
        self._best = state_dict.get("best", {})


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
