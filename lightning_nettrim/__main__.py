"""``python -m lightning_nettrim`` is ``nettrim``."""

from lightning_nettrim.cli import main

if __name__ == "__main__":
    main()
