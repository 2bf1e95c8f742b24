"""What MiniMax-M3 is: its config, and the maths that both hosts' layers share."""
