"""Reading and writing of files: scans, pictures, tensors, and atomic writes."""
