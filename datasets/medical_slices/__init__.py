"""Slices of medical scans with label maps, from a manifest of files."""
