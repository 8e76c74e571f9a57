"""CPU linear layers against the bandwidth of memory and torch's kernels: `bitnest bench kernels`
with more to choose from (`--help`)."""

from bitnest.kernels.bench.cpu import main

if __name__ == "__main__":
    main()
