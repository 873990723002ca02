"""Schema Registry: its wire format, who reads values by its schemas, and what it is asked for."""
