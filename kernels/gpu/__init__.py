"""Triton twins of the operations, one file each. Importing one of them loads Triton, so nothing does before a GPU's
first use; importing this package itself loads nothing."""
