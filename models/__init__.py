"""Workloads in plain PyTorch: a file each with `build(**sizes) -> (module, inputs)`; the folder is the list."""
