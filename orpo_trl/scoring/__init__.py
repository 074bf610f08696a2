"""Log-probabilities of pairs under a trained model."""
