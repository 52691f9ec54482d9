"""What training cost: written once it is over, for results that compare methods."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


@dataclass(frozen=True)
class TrainingCost:
    """What a training took.

    Attributes:
        trained_parameters: Numbers that training changed; shared ones count once.
        parameters: All of the model.
        steps: Of the optimizer.
        seconds: From the first to the last step, validations included, interruptions left out.
        best_score: Of the quantity that the best checkpoint was chosen by; None without one.
    """

    trained_parameters: int
    parameters: int
    steps: int
    seconds: float
    best_score: float | None


class TrainingReport(pl.Callback):
    """Writes a `TrainingCost` when training ends; a resumed run's seconds add up."""

    def __init__(self, path: Path | str) -> None:
        """
        Args:
            path: A JSON file.
        """
        self.path = Path(path)
        self._seconds_before = 0.0  # of the runs that this one resumes
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Time spent in training so far."""
        now = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds_before + now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        sizes = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
        best = getattr(trainer.checkpoint_callback, "best_model_score", None)
        cost = TrainingCost(
            trained_parameters=sum(size for size, trains in sizes if trains),
            parameters=sum(size for size, _ in sizes),
            steps=trainer.global_step,
            seconds=self.seconds,
            best_score=None if best is None else float(best),
        )
        unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        unfinished.write_text(json.dumps(asdict(cost), indent=2) + "\n")
        os.replace(unfinished, self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]
