"""One training step and the loop around it: loss, optimizer, mesh. It must not know a model family, data or files."""
