"""Block-sparse attention primitives for MiniMax-M3: one folder per op, torch only at import."""
