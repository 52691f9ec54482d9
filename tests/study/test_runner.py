"""A study runs everything once, continues after faults, and resumes what was interrupted."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_knnmt.files import locked
from lightning_knnmt.study import domain as domain_file
from lightning_knnmt.study import runner as runner_file
from lightning_knnmt.study.__main__ import main
from lightning_knnmt.study.plan import Study
from lightning_knnmt.study.process import carry_out, is_finished, read_usage
from lightning_knnmt.study.runner import Runner, minutes

NewStudy = Callable[..., Study]
NewRunner = Callable[..., Runner]


def starts(root: Path) -> int:
    """How many processes were started below a folder."""
    return sum(len(file.read_text().splitlines()) for file in root.rglob("starts.txt"))


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_cell_is_run_once(
    new_study: NewStudy, new_runner: NewRunner, tmp_path: Path, jobs: int
) -> None:
    runner = new_runner(new_study(), jobs=jobs)
    runner.run()
    assert set(runner.runs) == {(d, m) for d in ("one", "two") for m in new_study().methods}
    assert all(is_finished(run) for run in runner.runs.values())
    assert not runner.failures
    first = starts(tmp_path)
    assert first == 2 * (4 + 3)  # four methods, three pilots, two domains
    again = new_runner(new_study())
    again.run()
    assert again.runs == runner.runs
    assert starts(tmp_path) == first


def test_values_are_chosen_by_the_validation_loss(
    new_study: NewStudy, new_runner: NewRunner
) -> None:
    runner = new_runner(new_study())
    runner.run()
    for method in ("Adapter 64", "Adapter 128"):
        assert "lr=0.25" in runner.runs["one", method].overrides  # the nearest to 0.3
    base = runner.runs["two", "Adapter 64"].directory.resolve()
    model = f"model.path={base}/checkpoints/best.ckpt"
    assert model in runner.runs["two", "AK-MT + Adapter 64"].overrides


def test_one_domain_may_choose_for_all(
    new_study: NewStudy, new_runner: NewRunner, toy_study: str, tmp_path: Path
) -> None:
    said: list[str] = []
    runner = new_runner(new_study(toy_study + "choose_on: two\n"), said, jobs=2)
    runner.run()
    assert not [line for line in said if "waiting" in line]  # for each other, but for nobody else
    assert starts(tmp_path) == 2 * 4 + 3  # four methods in two domains, and three pilots
    assert {path.parent.name for path in tmp_path.glob("runs/*/pilot-*")} == {"two"}
    for domain in ("one", "two"):
        assert "lr=0.25" in runner.runs[domain, "Adapter 128"].overrides


def test_a_domain_is_tested_on_the_others(
    new_study: NewStudy, new_runner: NewRunner, tmp_path: Path
) -> None:
    runner = new_runner(new_study())
    runner.run()
    tests = [o for o in runner.runs["one", "NMT"].overrides if "also_test" in o]
    assert tests == [
        f"+data.also_test.two={tmp_path}/data/two/test",
        f"+data.also_test.news={tmp_path}/data/news",
    ]


def test_what_a_run_took_lies_beside_its_results(
    new_study: NewStudy, new_runner: NewRunner
) -> None:
    runner = new_runner(new_study())
    runner.run()
    run = runner.runs["one", "NMT"]
    usage = read_usage(run)
    assert usage is not None
    assert usage.command.startswith("python train.py model=toy data.root=")
    assert 0 < usage.seconds < 60
    # The script is small, but until it is loaded this process's memory counts as its own.
    own_kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 1e6 < usage.peak_memory_bytes <= 1024 * own_kibibytes


def test_a_failed_run_is_named_and_the_rest_goes_on(
    new_study: NewStudy, new_runner: NewRunner, tmp_path: Path
) -> None:
    text = """
domains: {one: [], two: []}
methods:
  NMT: {overrides: [fit=false]}
  Bad: {overrides: [module=explode]}
  On it: {model_of: Bad}
  FT: {}
"""
    said: list[str] = []
    runner = new_runner(new_study(text), said)
    runner.run()
    assert {method for _, method in runner.runs} == {"NMT", "FT"}
    assert len(runner.failures) == 4
    (bad,) = [line for line in said if "one · Bad failed" in line]
    assert "(exit status 1): error: it exploded." in bad
    assert "output.txt" in bad
    assert any("one · On it" in line and "Bad" in line for line in said)
    again = new_runner(new_study(text.replace("explode", "mended")))
    again.run()
    assert not again.failures


def test_a_run_without_all_its_results_has_failed(
    new_study: NewStudy, new_runner: NewRunner
) -> None:
    text = "tests: {news: x}\ndomains: {one: []}\nmethods: {Lazy: {overrides: [module=lazy]}}"
    runner = new_runner(new_study(text))
    runner.run()
    assert "exit status 0" in runner.failures[0]


def test_a_process_that_outlived_its_study_is_waited_for(
    new_study: NewStudy, new_runner: NewRunner, train: Path
) -> None:
    runner = new_runner(new_study())
    runner.run()
    run = runner.runs["one", "NMT"]
    (run.directory / "results.json").rename(run.directory / "later")

    def finish() -> None:
        time.sleep(0.3)
        (run.directory / "later").rename(run.directory / "results.json")

    before = (run.directory / "starts.txt").read_text()
    with locked(run.directory):
        other = threading.Thread(target=finish)
        said: list[str] = []
        waiting = threading.Thread(target=carry_out, args=(run, train, {}, set(), said.append))
        waiting.start()
        other.start()
        other.join()
        assert waiting.is_alive()
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    assert (run.directory / "starts.txt").read_text() == before
    (line,) = said
    assert "one · NMT: waiting" in line


@pytest.mark.parametrize("changed", ["one/train.de", "one/valid.en", "news.en", "base.ckpt"])
def test_what_has_read_other_text_or_another_model_is_run_again(
    new_study: NewStudy, new_runner: NewRunner, tmp_path: Path, changed: str
) -> None:
    study = new_study(f"""
overrides: [data=text, data.source_lang=de, data.target_lang=en, model.path={tmp_path}/base.ckpt]
tests: {{one: "{{data}}/one/test", news: "{{data}}/news"}}
domains: {{one: ["data.root={{data}}/one"]}}
methods: {{NMT: {{overrides: [fit=false]}}}}
""")
    (tmp_path / "data" / "one").mkdir()
    file = tmp_path / changed if changed == "base.ckpt" else tmp_path / "data" / changed
    for text, expected in [("a\n", 1), ("a\n", 1), ("b\n", 2), ("a\n", 2)]:
        file.write_text(text)
        new_runner(study).run()
        assert starts(tmp_path) == expected


def test_a_killed_study_goes_on_where_it_stood(
    new_study: NewStudy, new_runner: NewRunner, tmp_path: Path, train: Path
) -> None:
    slow = train.read_text().replace(
        'if "explode"', 'import time; time.sleep(1.5 * ("size" in settings))\nif "explode"'
    )
    train.write_text(slow)
    new_study()
    script = f"""
from pathlib import Path
from lightning_knnmt.study.runner import Runner
from lightning_knnmt.study.study_file import read_study
study = read_study(Path({str(tmp_path / "toy.yaml")!r}), Path({str(tmp_path / "data")!r}))
Runner(study, Path({str(tmp_path / "runs")!r}), train=Path({str(train)!r})).run()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").rglob("Adapter-128*/starts.txt")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # in the middle of the first slow run
    process.wait()
    runner = new_runner(new_study())
    runner.run()
    assert not runner.failures
    assert len(runner.runs) == 8
    assert starts(tmp_path) == 2 * (4 + 3)  # the killed study's process was waited for


def test_a_study_that_is_told_to_end_ends_its_runs(
    new_study: NewStudy, tmp_path: Path, train: Path
) -> None:
    train.write_text(train.read_text().replace("rows = []", "import time; time.sleep(100)"))
    new_study()
    script = f"""
from pathlib import Path
from lightning_knnmt.study import runner
from lightning_knnmt.study.__main__ import main
runner.TRAIN = Path({str(train)!r})
main([
    {str(tmp_path / "toy.yaml")!r}, "--data", {str(tmp_path / "data")!r},
    "--output", {str(tmp_path / "runs")!r},
])
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs").rglob("starts.txt")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert "Interrupted" in process.communicate(timeout=30)[1]
    (started,) = (tmp_path / "runs").rglob("starts.txt")
    with locked(started.parent, wait=False):  # held as long as the run lives
        pass


def test_a_domain_that_is_not_there_cannot_be_analysed(new_study: NewStudy, tmp_path: Path) -> None:
    new_study()
    options = [str(tmp_path / "toy.yaml"), "--data", str(tmp_path / "data"), "--report-only"]
    with pytest.raises(SystemExit, match=r"'three'.*one, two"):
        main([*options, "--analyses", "three"])


def test_analyses_that_fail_cost_no_report(
    new_study: NewStudy,
    train: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def analyse_domain(*_: object) -> None:
        raise ValueError("The in-domain corpus has no word.")

    monkeypatch.setattr(domain_file, "analyse_domain", analyse_domain)
    monkeypatch.setattr(runner_file, "TRAIN", train)
    new_study(
        "overrides: [data.target_lang=en]\ndomains: {one: ['data.root={data}/one']}\n"
        "methods: {NMT: {overrides: [fit=false]}}"
    )
    (tmp_path / "data" / "one").mkdir()
    (tmp_path / "data" / "one" / "test.en").write_text("a\n" * 4)
    options = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "runs")]
    assert main([str(tmp_path / "toy.yaml"), *options]) == 1
    said = "The in-domain corpus has no word."
    assert said in capsys.readouterr().err
    report = (tmp_path / "runs" / "toy" / "toy.md").read_text()
    assert said in report
    assert "## Adapted to one" in report


def test_a_failing_process_leaves_no_record(
    new_study: NewStudy, new_runner: NewRunner, tmp_path: Path
) -> None:
    runner = new_runner(new_study("domains: {d: []}\nmethods: {M: {overrides: [module=explode]}}"))
    runner.run()
    assert runner.failures
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize(
    ("script", "reasons"),
    [
        (
            "print('Could not override x.\\nTo append use +x\\n\\nSet the environment variable '"
            "'HYDRA_FULL_ERROR=1 for a stack trace.'); raise SystemExit(1)",
            ("exit status 1", "Could not override x. Its"),
        ),
        (
            "import os, signal; print('error: of old'); os.kill(os.getpid(), signal.SIGKILL)",
            ("SIGKILL", "memory", "error: of old"),
        ),
        ("raise SystemExit(3)", ("exit status 3", "nothing")),
    ],
)
def test_why_a_run_failed_is_said(
    new_study: NewStudy, new_runner: NewRunner, train: Path, script: str, reasons: tuple[str, ...]
) -> None:
    runner = new_runner(new_study("domains: {d: []}\nmethods: {M: {}}"))
    train.write_text("print('error: the first time'); raise SystemExit(1)")
    runner.run()
    train.write_text(script)
    runner.failures.clear()
    runner.run()
    (failure,) = runner.failures
    assert all(reason in failure for reason in reasons)
    assert "the first time" not in failure


@pytest.mark.parametrize("loss", ["NaN", "null", "Infinity"])
def test_a_trial_whose_loss_is_no_number_loses(
    new_study: NewStudy, new_runner: NewRunner, train: Path, loss: str
) -> None:
    text = train.read_text()
    train.write_text(
        text.replace("json.dumps(cost))\n    sys", f"'{{\"best_score\": {loss}}}')\n    sys")
    )
    runner = new_runner(new_study())
    runner.run()
    assert {method for _, method in runner.runs} == {"NMT"}
    failure = runner.failures[0]
    assert "one · Adapter 64" in failure
    assert "lr=0.9" in failure


def test_what_runs_is_said_when_it_starts(
    new_study: NewStudy, new_runner: NewRunner, train: Path
) -> None:
    seen: list[str] = []
    said: list[str] = []
    runner = new_runner(new_study(), said)
    report = runner.report
    runner.report = lambda line: (report(line), seen.append(runner.status()))[0]  # type: ignore[func-returns-value]
    runner.run()
    run = runner.runs["one", "NMT"]
    assert said[0].startswith("one · NMT: running")
    assert str(run.directory / "output.txt") in said[0]
    started = [line for line in said if "running" in line]
    assert len(started) == 2 * (4 + 3)  # pilots too
    assert seen[0].startswith("0 of 8")
    assert seen[-1] == "8 of 8 finished; running:"
    said.clear()
    new_runner(new_study(), said).run()
    assert not [line for line in said if "running" in line]


def test_the_status_names_what_runs(new_study: NewStudy, new_runner: NewRunner) -> None:
    runner = new_runner(new_study())
    runner._running["one · NMT"] = time.perf_counter() - 125
    assert runner.status().splitlines()[1:] == ["  one · NMT: 2 min"]


def test_durations_are_readable() -> None:
    assert [minutes(s) for s in (42, 420, 7500)] == ["42 s", "7 min", "2 h 05 min"]


def test_a_missing_test_set_is_noticed(new_study: NewStudy, new_runner: NewRunner) -> None:
    runner = new_runner(new_study())
    runner.run()
    run = runner.runs["one", "NMT"]
    rows = json.loads((run.directory / "results.json").read_text())
    (run.directory / "results.json").write_text(json.dumps(rows[:1]))
    assert not is_finished(run)
