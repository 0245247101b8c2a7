"""`python -m ant5m`, which is `ant5m`: for torchrun, as in `torchrun --nproc-per-node 2 -m ant5m train`."""

from ant5m.cli import main

if __name__ == "__main__":
    main()
