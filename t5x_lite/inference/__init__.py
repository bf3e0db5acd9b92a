"""What a trained model is used for: decoding, evaluation, predictions for tasks, files and Python callers."""
