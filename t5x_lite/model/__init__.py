"""The T5 network, and the interface of all model families (interface.py). Must not import training, data or files."""
