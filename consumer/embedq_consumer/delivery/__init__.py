"""Outcomes become result records, are acknowledged by the broker, and only then is a record finished."""
