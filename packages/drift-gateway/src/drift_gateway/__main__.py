"""`python -m drift_gateway serve|demo`: the commands without the console script `drift`."""

from __future__ import annotations

import click

from drift_gateway import cli

if __name__ == "__main__":
    click.Group("drift", commands={"serve": cli.serve, "demo": cli.demo})()
