"""Before a new model serves, the vectors that jobs ask for most are computed with it and put into the cache."""
