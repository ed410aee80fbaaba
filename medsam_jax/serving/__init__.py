"""Server of the nnInteractive remote protocol, for napari and 3D Slicer."""
