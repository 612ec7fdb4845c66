"""What single papers add to an RL step."""
