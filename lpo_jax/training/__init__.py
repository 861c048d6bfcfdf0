"""Training: the state, the step, and keeping both safe."""
