"""Forward passes: those written out here, and transformers' own for every other architecture."""
