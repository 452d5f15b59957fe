"""HTTP: the one application, its surfaces and its error answers."""
