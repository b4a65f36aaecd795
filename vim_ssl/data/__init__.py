"""Data: one spec string, many sources, items as dicts."""
