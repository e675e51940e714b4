"""The Vision Transformer: its widths, its units and masks, its function, its directory on disk. CNN teachers, too."""
