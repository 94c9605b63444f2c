"""Start, probe and stop Triton."""
