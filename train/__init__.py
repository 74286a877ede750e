"""The trainer, the evaluator, and their metrics."""
