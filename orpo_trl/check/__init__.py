"""What a run needs, from its recipe alone, before GPUs are rented."""
