"""Corpus preparation; the prepared texts lie beside it and are git-ignored."""
