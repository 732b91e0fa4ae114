"""The operations on a GPU: torch's own where they are fast, Triton kernels where they are not."""
