"""What the HTTP side of the server can deliver, with a stand-in for the engine; `make bench-front`."""
