"""Choosing codes that serve several widths at once; one module per kind of nested format."""
