"""The command `orpo-trl evaluate`: benchmarks of a model, of a run, or of answers."""
