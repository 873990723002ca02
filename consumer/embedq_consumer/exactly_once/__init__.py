"""Results of the bulk lane, each published exactly once: in transactions, together with the offsets that they answer."""
