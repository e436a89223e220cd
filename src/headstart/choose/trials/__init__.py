"""Runs of several arms that share everything but their start and their rate."""
