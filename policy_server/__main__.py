"""`python -m policy_server`: the same as the `policy-server` command."""

from policy_server.cli import app

app()
