"""`python -m drift_gateway serve|demo`: the commands without the console script `drift`."""

from __future__ import annotations

import click

from drift_gateway.commands import clients, serve

if __name__ == "__main__":
    click.Group("drift", commands={"serve": serve.serve, "demo": clients.demo})()
