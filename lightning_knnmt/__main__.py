"""`python -m lightning_knnmt` is the command `lightning-knnmt`."""

import sys

from lightning_knnmt.cli import main

if __name__ == "__main__":
    sys.exit(main())
