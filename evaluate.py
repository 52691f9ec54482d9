r"""Tests any checkpoint or pretrained model on any test files, with and without retrieval.

    python evaluate.py model.path=outputs/NAME/checkpoints/best.ckpt \
        data.root=DIR data.source_lang=de data.target_lang=en knn=fixed
    python evaluate.py --help                   every group, choice and setting
"""

import hydra
from omegaconf import DictConfig

from train import launch, run_or_explain


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    run_or_explain(config)


if __name__ == "__main__":
    launch(main, "evaluate")
