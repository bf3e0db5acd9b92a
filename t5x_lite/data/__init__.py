"""From SeqIO tasks to batches of numpy arrays. Only pipeline.py and inspection.py import TensorFlow and SeqIO."""
