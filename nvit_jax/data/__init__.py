"""Images and labels: sources, decoding, augmentation, batches by step."""
