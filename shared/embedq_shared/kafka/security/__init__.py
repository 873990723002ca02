"""How a client proves who it is, and what the brokers say if they do not believe it."""
