"""What a sequence remembers: which streams of rows, in which format, where they live."""
