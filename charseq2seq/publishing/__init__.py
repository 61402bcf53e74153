"""The wing behind push_to_huggingface.py: checkpoint -> repository folder -> Hub."""
