"""Text becomes token ids, and a long text becomes windows."""
