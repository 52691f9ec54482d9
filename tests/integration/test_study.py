"""The study's command on toy text, from the first run to the report with all analyses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDY = """
description: Toy words.
overrides:
  - model=pretrained
  - model.path={model}
  - data=text
  - data.source_lang=pt
  - data.target_lang=en
  - data.max_tokens=400
  - decoding=greedy
  - index=flat
  - trainer.max_epochs=-1
  - trainer.max_steps=4
  - trainer.val_check_interval=2
  - trainer.enable_progress_bar=false
  - module.decay=linear
  - paths.cache={cache}
tests: {{news: "{{data}}/test"}}
domains: {{words: ["data.root={{data}}"]}}
methods:
  NMT: {{overrides: [fit=false]}}
  kNN-MT: {{overrides: [fit=false, knn=fixed, knn.max_neighbours=8]}}
  AK-MT:
    overrides: [fit=false, knn=adaptive, knn.max_neighbours=8, knn.trainer.max_updates=20]
  Adapter 8:
    overrides: [module=adapter, module.bottleneck_dim=8]
    choose: {{module.optimizer.lr: [1.0e-3]}}
    pilot_batches: 2
  FT: {{overrides: [module=full]}}
  AK-MT + Adapter 8:
    model_of: Adapter 8
    overrides: [fit=false, knn=adaptive, knn.max_neighbours=8, knn.trainer.max_updates=20]
baselines: [NMT, FT]
general_text: "{{data}}/valid"
choose_on: words
analyses: {{base: NMT, retrieval: kNN-MT, adaptive: AK-MT, full: FT, adapted: AK-MT + Adapter 8}}
analysed_sentences: 20
"""


@pytest.mark.slow
def test_one_command_makes_the_report(
    trained: Path, words: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "toy.yaml").write_text(
        STUDY.format(model=trained / "checkpoints" / "best.ckpt", cache=cache)
    )
    command = [
        *(sys.executable, "-m", "lightning_knnmt.study", str(tmp_path / "toy.yaml")),
        *("--data", str(words), "--output", str(tmp_path / "out"), "--jobs", "2"),
        *("--report", str(tmp_path / "report")),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    text = (tmp_path / "report" / "toy.md").read_text()
    for heading in (
        "## Adapted to words",
        "### words: word recall by in-domain frequency",
        "### words: the gradient that retrieval stands for, against the output projection's",
        "### words: probability of the gold token",
        "### words: gold token among the neighbours",
        "### words: datastore size",
        "### words: order of adapters and combiner",
        "### words: decoding speed",
    ):
        assert heading in text
    assert str(tmp_path) not in text.replace(str(tmp_path / "toy.yaml"), "")
    for figure in text.split("](")[1:]:
        path = tmp_path / "report" / figure.split(")")[0]
        assert path.read_bytes().startswith(b"\x89PNG")
    facts = json.loads((tmp_path / "report" / "toy.json").read_text())
    assert len(facts["systems"]) == 6 * 2
    assert facts["analyses"]["words"].keys() == {
        *("word recall", "word recall against FT", "gradients", "predictions", "neighbours"),
        *("datastore size", "order", "speed"),
    }

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert (tmp_path / "report" / "toy.md").read_text() == text
