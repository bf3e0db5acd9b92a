"""The networks: T5, and what any model family has to offer (interface.py). It must not know training, data or files."""
