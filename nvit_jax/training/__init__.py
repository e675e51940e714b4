"""Losses, optimizers, the training loop and its saved states, evaluation."""
