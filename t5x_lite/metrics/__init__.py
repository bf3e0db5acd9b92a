"""What a run reports: JSON lines, TensorBoard events, progress, and the published speed of the hardware."""
