"""How a target stands beside its source: what it covers, and what of it is stale."""
