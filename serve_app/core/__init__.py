"""The pure core: standard library only; nothing here waits, reads a clock or draws a number."""
