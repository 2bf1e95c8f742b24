"""Which blocks the sparse layers chose: recorded while serving, summed up and drawn afterwards."""
