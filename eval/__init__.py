"""Evaluation: benchmarks in, predictions and scores out (`python -m eval.infer`, `python -m eval.score`)."""
