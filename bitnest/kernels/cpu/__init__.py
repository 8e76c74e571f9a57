"""CPU kernels: C with SIMD, compiled at first use (`library`), and weights laid out for it."""
