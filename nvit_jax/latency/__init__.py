"""What a model costs in milliseconds: measured on this device, read from a table, or estimated."""
