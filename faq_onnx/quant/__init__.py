"""Low-bit numerics on plain arrays: formats, packing, grids, searches. No graphs here."""
