"""What the gateway's benchmarks share: a bare echo server, streams that are checked, and processes that are watched."""
