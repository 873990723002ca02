"""What comes from the brokers is read within bounds, and what cannot be read stands among the rest."""
