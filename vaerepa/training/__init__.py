"""Training: setup (built before the first step), state (changed by the steps), monitor, validation and publishing."""
