"""Rows: their schemas, and reading and writing the files that hold them."""
