"""A study of a stand-in for train.py that takes milliseconds and leaves the same files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_knnmt.study.plan import Study
from lightning_knnmt.study.runner import Runner
from lightning_knnmt.study.study_file import read_study

TRAIN = """
import json, pathlib, sys

settings = dict(argument.lstrip("+").split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(settings["hydra.run.dir"])
with (folder / "starts.txt").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if "explode" in settings.get("module", ""):
    sys.exit("error: it exploded.")
if settings.get("test") == "false":
    cost = {"best_score": abs(float(settings["lr"]) - 0.3)}
    (folder / "training.json").write_text(json.dumps(cost))
    sys.exit()
if settings.get("fit") != "false":
    cost = {"trained_parameters": 64, "parameters": 640, "steps": 5}
    cost |= {"seconds": 90.0, "cpu_seconds": 80.0, "best_score": 2.5}
    (folder / "training.json").write_text(json.dumps(cost))
others = [key for key in settings if "also_test" in key]
names = ["own/test"] + [key.removeprefix("data.also_test.") for key in others]
if "lazy" in settings.get("module", ""):
    names = names[:1]
rows = []
for name in names:
    hypotheses = ["the house is red ."] * 3 + ["no ."]
    stem = name.replace("/", "-")
    (folder / f"hypotheses.{stem}.NMT.txt").write_text("".join(h + "\\n" for h in hypotheses))
    rows.append({
        "method": "NMT", "test_set": name, "bleu": 10.0 + len(settings.get("module", "")),
        "bleu_signature": "b", "chrf": 30.0, "chrf_signature": "c",
        "sentences": 4, "target_tokens": 20, "seconds": 2.0,
    })
(folder / "results.json").write_text(json.dumps(rows))
"""
STUDY = """
description: A toy.
overrides: [model=toy]
tests: {one: "{data}/one/test", two: "{data}/two/test", news: "{data}/news"}
domains:
  one: ["data.root={data}/one"]
  two: ["data.root={data}/two"]
methods:
  NMT: {overrides: [fit=false]}
  Adapter 64:
    overrides: [module=adapter]
    choose: {lr: [0.1, 0.25, 0.9]}
  Adapter 128: {overrides: [module=adapter, size=128], choices_of: Adapter 64}
  AK-MT + Adapter 64: {model_of: Adapter 64, overrides: [fit=false]}
"""


@pytest.fixture
def toy_study() -> str:
    return STUDY


@pytest.fixture
def train(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(TRAIN)
    return path


@pytest.fixture
def new_study(tmp_path: Path) -> Callable[..., Study]:
    def make(text: str = STUDY) -> Study:
        path = tmp_path / "toy.yaml"
        path.write_text(text)
        (tmp_path / "data").mkdir(exist_ok=True)
        return read_study(path, tmp_path / "data")

    return make


@pytest.fixture
def new_runner(tmp_path: Path, train: Path) -> Callable[..., Runner]:
    def make(study: Study, said: list[str] | None = None, jobs: int = 1) -> Runner:
        report = (said if said is not None else []).append
        return Runner(study, tmp_path / "runs", jobs=jobs, train=train, report=report)

    return make
