"""Exactly invertible changes of a weight's input basis, applied online or folded into the model.

Outliers in a few channels and correlations between channels cost bits. A transform T moves to a
basis where they cost fewer and leaves the product as it was:

    (x T_in) (W T_w)^T = x W^T        with T_in T_w^T = I

`per_matrix` has the transforms, `channel_scales` and `permutation` choose them from statistics,
`online` applies one to any layer as it runs, `fold` puts it into the weights before and after an
edge that `trace` found, `residual` rotates a whole model, and `proof` decides what is kept.
"""

from bitnest.quantize.transforms.per_matrix import (
    ChannelScale,
    Hadamard,
    Permutation,
    Transform,
)

__all__ = ["ChannelScale", "Hadamard", "Permutation", "Transform"]
