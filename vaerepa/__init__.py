"""The rooms that train_vaerepa.py calls, one per concern."""

import logging

# xformers warns at import when its kernels do not fit the installed torch; nothing here uses them unless asked to
logging.getLogger("xformers").setLevel(logging.ERROR)
