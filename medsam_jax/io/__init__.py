"""Files in and out: scans, pictures, tensors, and writing them whole."""
