"""The operations on a GPU: torch's own where they are fast, kernels in Triton where they are not."""
