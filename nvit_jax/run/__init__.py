"""The command line: configs in, calls of the library, files out."""
