"""`embedq golden`: texts and the vectors that a model must give for them."""
