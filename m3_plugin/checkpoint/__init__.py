"""What a checkpoint holds and how it reaches a host's modules."""
