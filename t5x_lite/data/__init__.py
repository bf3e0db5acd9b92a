"""Build batches of numpy arrays from SeqIO tasks."""
