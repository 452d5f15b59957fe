"""One thin file per Ray Serve deployment."""
