"""Evidence that the kernels are right, gathered without a GPU, and the same checks on one: docs/kernels.md.

python -m megalite_kernels.validate [--device cuda]
"""
