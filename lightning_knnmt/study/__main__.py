r"""Makes a study's tables: every method on every domain, in- and out-of-domain, with a report.

    python -m lightning_knnmt.study studies/pt_en.yaml --data DIR

What is finished is not run again; interrupted training goes on from its last checkpoint.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

# As in train.py: threads that wait by spinning take several times as long on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from lightning_knnmt.study import study_file
from lightning_knnmt.study.domain import Analysed, analyse_domain
from lightning_knnmt.study.outcomes import collect_cells, collect_costs
from lightning_knnmt.study.plan import Study, StudyError, chosen, require_files
from lightning_knnmt.study.report import machine, write_report
from lightning_knnmt.study.runner import Runner
from lightning_knnmt.terminal import quieten_libraries


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_knnmt.study",
        description=__doc__,
        epilog=study_file.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", type=Path, help="a YAML file; studies/ holds some")
    parser.add_argument("--data", type=Path, help="the folder that the study calls {data}")
    parser.add_argument("--model", type=Path, help="the model that the study calls {model}")
    parser.add_argument("--domains", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/studies"), help="where studies are kept"
    )
    parser.add_argument("--report", type=Path, help="folder of the report (default: the study's)")
    parser.add_argument(
        "--analyses",
        nargs="*",
        metavar="DOMAIN",
        help="domains that are analysed, some minutes each (default: all; none named: none)",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="of what is finished: run nothing"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    quieten_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the runs stop too
    # Runs are named after their commands, which should not depend on where this one was typed.
    for name in ("data", "model"):
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).resolve())
            if not getattr(options, name).exists():
                sys.exit(f"error: There is no {getattr(options, name)}, which --{name} names.")
    try:
        study = study_file.read_study(options.study, options.data, options.model)
        study = study.select(options.domains, options.methods)
        analysed = (
            chosen("domain", study.domains, options.analyses) if options.analyses != [] else ()
        )
        if not options.report_only:
            require_files(study)
        runner = Runner(study, options.output / study.name, jobs=options.jobs)
        runner.run(start=not options.report_only)
        report(study, runner, options, analysed)
    except (StudyError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the same command goes on from here.")
    for failure in runner.failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if runner.failures else 0


def report(
    study: Study, runner: Runner, options: argparse.Namespace, analysed: Iterable[str]
) -> None:
    """Writes the report of what is finished."""
    directory = options.report or runner.root
    directory.mkdir(parents=True, exist_ok=True)
    found: dict[str, Analysed] = {}
    for domain in analysed:
        runs = {m: runner.runs[domain, m] for m in study.methods if (domain, m) in runner.runs}
        try:
            found[domain] = analyse_domain(study, domain, runs, runner.root)
        except (ValueError, OSError) as error:  # the tables are worth a report all the same
            runner.failures.append(f"{domain}: its analyses failed: {error}")
            continue
        shutil.copytree(found[domain].figures, directory / study.name, dirs_exist_ok=True)
    hidden = (
        *((options.data, "DATA"), (options.model, "MODEL"), (options.report, "REPORT")),
        *((options.output.resolve(), "OUTPUT"), (options.output, "OUTPUT")),
    )
    path = write_report(
        directory,
        study,
        collect_cells(study, runner.runs),
        collect_costs(study, runner.runs, runner.chosen),
        command=shlex.join(["python", "-m", "lightning_knnmt.study", *sys.argv[1:]]),
        machine=machine(),
        failures=runner.failures,
        hide={str(path): name for path, name in hidden if path is not None},
        sections=[part for each in found.values() for part in each.sections],
        analyses={domain: each.facts for domain, each in found.items()},
    )
    print(f"Report: {path}")


if __name__ == "__main__":
    sys.exit(main())
