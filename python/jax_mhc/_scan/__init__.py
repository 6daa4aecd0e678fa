"""The scan that keeps the streams of its iterations in place."""
