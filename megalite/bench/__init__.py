"""Microbenchmarks: each op of megalite_kernels at a model's shapes, beside the same op of other packages."""
