"""The workflow definitions that every installation ships."""
