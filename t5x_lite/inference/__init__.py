"""Use a trained model: decoding, evaluation, and predictions for tasks, files and Python callers."""
