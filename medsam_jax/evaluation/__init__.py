"""Runs models over a data set or scans: scores, tables, statistics and figures."""
