"""The trajectory, its file, the index, checks, the report, and windows for training."""
