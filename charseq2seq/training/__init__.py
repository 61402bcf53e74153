"""The wing behind train_transformer.py."""
