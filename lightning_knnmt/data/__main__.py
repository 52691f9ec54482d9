"""``python -m lightning_knnmt.data``: lists the catalogue, or downloads entries of it."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from lightning_knnmt.data.catalog import (
    CORPORA,
    MODELS,
    CorpusEntry,
    ModelEntry,
    prepare_corpus,
    prepare_model,
)
from lightning_knnmt.files import default_cache


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Lists the named corpora and models, or downloads some and says where they are."
    )
    parser.add_argument("names", nargs="*", help="what to download; without any, all are listed")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=default_cache(),
        help="where downloads are kept (default: %(default)s, where training looks for them too)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in arguments.names:
        prepare = prepare_model if name in MODELS else prepare_corpus
        print(prepare(name, arguments.cache_dir))
    if not arguments.names:
        entries: list[CorpusEntry | ModelEntry] = [*CORPORA.values(), *MODELS.values()]
        for entry in entries:
            print(f"{entry.name:18} {entry.source}; licence {entry.licence}; {entry.note}")


if __name__ == "__main__":
    main()
