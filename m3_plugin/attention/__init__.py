"""The heart: one step of MiniMax sparse attention, from a host's batch to kernels."""
