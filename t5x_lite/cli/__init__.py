"""The command: the only package that knows `RunConfig` and wires the others. One function for each mode."""
