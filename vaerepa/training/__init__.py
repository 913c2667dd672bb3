"""Training: what is built before the first step, what the steps change, what is told of them, and how it is validated."""
