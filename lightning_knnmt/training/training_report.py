"""What training cost: written once it is over, for results that compare methods."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lightning_knnmt.files import write_atomically


@dataclass(frozen=True)
class TrainingCost:
    """What a training took.

    Attributes:
        trained_parameters: Numbers that training changed; shared ones count once.
        parameters: All of the model.
        steps: Of the optimizer.
        seconds: From the first to the last step, validations included, interruptions left out.
        cpu_seconds: What the processor spent on it, of all threads of this process: where other
            programs want the cores too, the steadier measure.
        best_score: Of the quantity that the best checkpoint was chosen by; None without
            a finite one.
    """

    trained_parameters: int
    parameters: int
    steps: int
    seconds: float
    cpu_seconds: float
    best_score: float | None


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

    @property
    def seconds(self) -> tuple[float, float]:
        """Time spent in training so far: by the clock, and by the processor."""
        if self._started is None:
            return self._before
        clock, processor = (now - start for now, start in zip(_now(), self._started, strict=True))
        return self._before[0] + clock, self._before[1] + processor

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = _now()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Of a run that died after its last step, nothing is left to train when it is resumed, and
        # Lightning then leaves out the end of training.
        if not self.path.exists():
            self._write(trainer, pl_module)

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
        )
        write_atomically(self.path, json.dumps(asdict(cost), indent=2, allow_nan=False) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        clock, processor = state_dict["seconds"]
        self._before = (clock, processor)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
