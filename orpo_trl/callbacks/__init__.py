"""What a run does beside training, one concern per file."""
