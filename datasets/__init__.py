"""TFDS builders by folder and the commands that build and inspect them. Never installed."""
