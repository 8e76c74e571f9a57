"""Speed of bitnest's kernels on this GPU, in under nine minutes (`make bench-gpu`): `bitnest bench
kernels` with more to choose from (`--help`)."""

import sys

from bitnest.kernels.bench.gpu import main

if __name__ == "__main__":
    sys.exit(main())
