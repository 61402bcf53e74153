"""A Hugging Face Hub on loopback for the real client: see server.py."""
