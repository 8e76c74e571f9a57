"""Speed of kernels on this machine: what `bitnest bench kernels` and `benchmarks/` run.

Shares of what memory gives: on a CPU of a streaming read (`cpu`), on a GPU of a copy (`gpu`), both
measured in the same run.
"""
