"""vLLM adapter of m3-plugin."""
