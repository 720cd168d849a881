"""GPU kernels through Triton."""
