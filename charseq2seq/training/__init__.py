"""What train_transformer.py needs to train and to measure."""
