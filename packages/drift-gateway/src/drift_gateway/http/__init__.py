"""The optional HTTP port (`--http`): metrics and health for operators' tools, the dashboard for people. Read-only."""
