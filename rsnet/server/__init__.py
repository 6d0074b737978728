"""The web server of a release: FastAPI's routes around one thread that owns the network."""
