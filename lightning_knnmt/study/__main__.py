r"""Makes a study's tables: every method on every domain, in- and out-of-domain, with a report.

    python -m lightning_knnmt.study conf/study/pt_en.yaml --data DIR

What is finished is not run again; interrupted training goes on from its last checkpoint.
"""

import argparse
import sys
from pathlib import Path

from lightning_knnmt.study.plan import StudyError, read_study
from lightning_knnmt.study.runner import Runner


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_knnmt.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", type=Path, help="a YAML file; conf/study/ holds some")
    parser.add_argument("--data", type=Path, help="the folder that the study calls {data}")
    parser.add_argument("--domains", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/studies"), help="where studies are kept"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        study = read_study(options.study, options.data)
        study = study.select(options.domains, options.methods)
        runner = Runner(study, options.output / study.name, jobs=options.jobs)
        runner.run()
    except StudyError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the same command goes on from here.")
    for failure in runner.failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if runner.failures else 0


if __name__ == "__main__":
    sys.exit(main())
