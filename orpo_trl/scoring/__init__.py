"""What a model does with pairs and prompts, once it is trained."""
