"""What people run in a terminal against a running server: chat, top, load, demo. Clients of the API like any other."""
