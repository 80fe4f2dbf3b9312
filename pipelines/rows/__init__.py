"""Rows: their schemas, and the files that hold them."""
