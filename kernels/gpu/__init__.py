"""Triton twins of the operations, loaded on first use on a GPU (or with TRITON_INTERPRET=1, on the CPU)."""
