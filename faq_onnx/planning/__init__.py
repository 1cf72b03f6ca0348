"""Decide formats and channel scales; nothing here changes a graph."""
