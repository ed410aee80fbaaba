"""Readers and writers of files: scans, pictures and tensors; atomic writing."""
