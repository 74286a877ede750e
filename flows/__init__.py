"""Prefect flows, one file per job, and the `lram` command."""
