"""Connections to stores that sources and sinks share."""
