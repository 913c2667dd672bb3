"""Modules that train_vaerepa.py calls, one per concern."""
